"""The command line: one file a group of verbs; light verbs import no torch."""
