"""Questions for the model, in training and afterwards."""

KIND_QUESTION = "What kind of thing is this?"
NAME_QUESTION = "What is in the picture?"
TEXT_QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What do you need to bake a cake?",
)
