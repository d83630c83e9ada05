"""Instruments: pictures, words and exact facts in, numbers out.

Holds the alphabet of the rendered worlds (outlines, colours, glyphs, letters), which renderers and judges share. Never
knows who drew a picture.
"""
