"""What quantize.py is made of."""
