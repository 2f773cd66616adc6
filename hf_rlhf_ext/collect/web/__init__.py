"""The page on which people judge completions: a Starlette app, its security, its Markdown and the server."""
