"""HTML pages of one file, without network and script: the document, its parts, its charts."""
