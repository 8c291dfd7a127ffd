"""The web page of web_demo.py: a chat about pictures, for many visitors of one model."""
