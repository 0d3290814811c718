"""What is written and shown: records of results, figures, exchange files, tables, pages."""
