"""The demo: easy-vqa, a public set of questions about pictures of one coloured shape, through the whole pipeline."""
