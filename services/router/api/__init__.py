"""The HTTP side: OpenAI's endpoints, errors and streaming format."""
