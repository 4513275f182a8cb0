"""Early exits for LLM serving with vLLM."""

__version__ = "0.2.0"
