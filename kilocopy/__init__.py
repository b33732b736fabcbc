"""kilocopy: how many copies of a trained model does this hardware run at once, how fast, and what does a page cost?

The way of a load test, one verb and one module each: spec -> serve -> drive -> measure -> price -> report.
"""

__version__ = "0.1.0"
