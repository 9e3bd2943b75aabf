"""What a run will need: memory and time per topology, played steps, published models."""
