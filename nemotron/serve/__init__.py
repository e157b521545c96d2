"""An OpenAI-compatible server over the engine, and a conversation in the terminal."""
