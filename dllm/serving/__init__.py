"""An HTTP server over one engine: OpenAI's interface, events of every step, and a page."""
