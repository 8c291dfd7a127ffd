"""The demo with real parts: a published language model and tower, and pictures that people drew and photographed."""
