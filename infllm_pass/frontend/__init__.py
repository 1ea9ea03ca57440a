"""What users call: sparsify and its companions, the Dynamo backend, generation, the functional form."""
