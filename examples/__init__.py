"""The application: programs at the top (`run_glue`, …), what they stand on in packages below."""
