"""Phase one: documents to sorted runs of token ids."""
