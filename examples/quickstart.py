"""Draw a picture, then ask the same model what it drew."""

import sys

import unimm

model = unimm.load(*sys.argv[1:2])

reply = model.generate("a red heart above a blue star", seed=0)[0]
picture = reply.images[0]
picture.save("heart.png")
print("drawn: heart.png", picture.size)

print("described:", model.understand(picture)[0].text)
print("counted:", model.understand(picture, "how many hearts are there?")[0].text)

answer = model.chat([{"role": "user", "content": "show me an orange heart and say what it is"}], seed=0)
for part in answer.parts:
    print("chat:", part)
