"""Decoder layers behind one interface (base.py): fused (llama.py) and Hugging Face's own."""
