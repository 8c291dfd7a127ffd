"""Side room: the checkpoint's file format."""
