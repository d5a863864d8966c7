"""The three laws, the architecture rules and the documents."""
