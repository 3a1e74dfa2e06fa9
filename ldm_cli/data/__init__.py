"""The common data layer: shards and index, order, decoding, batches, synthetic scenes, tokenizer."""
