"""Sources of records: files and generated biographies."""
