"""A policy behind HTTP and WebSocket: wire formats, checks of requests, batching, server, client."""
