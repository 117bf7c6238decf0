"""A server of answers: OpenAI's API and a page, over the generator that batches requests."""
