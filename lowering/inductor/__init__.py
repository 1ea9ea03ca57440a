"""What Inductor and AOTInductor need to compile the operators."""
