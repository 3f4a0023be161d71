"""The HTTP server and the command line: OpenAI's protocol over any
`sloraj.frontend_api.FrontendApi`.
"""
