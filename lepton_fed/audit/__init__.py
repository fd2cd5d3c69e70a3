"""The audit of a run: is its training as private as its epsilon says?"""
