"""Inference: the engine, its runners, HTTP and the OpenAI API."""
