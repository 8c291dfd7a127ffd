"""From raw annotation files to ``image_map.json`` and ``captions.json``. Needs no torch."""
