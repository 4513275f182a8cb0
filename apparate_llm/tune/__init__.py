"""`apparate-llm tune`: how this machine serves a model fastest, by measuring."""
