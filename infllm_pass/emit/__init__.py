"""Writing into graphs: inserting calls with their metadata, and mask operands as vectors."""
