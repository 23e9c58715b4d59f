"""ONNX models in: a file becomes the same kind of program that a Hugging Face model does."""
