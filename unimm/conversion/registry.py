"""Every upstream that can be converted; a new one is one map file and one line here."""

from __future__ import annotations

from unimm.config import did_you_mean
from unimm.conversion.maps import (
    atoken,
    comit,
    dualtoken,
    dualvitok,
    evotok,
    flextok,
    fqgan,
    gigatok,
    instella,
    karl,
    lavit,
    lavit_system,
    llamagen,
    mingtok,
    omnitokenizer,
    restok,
    seed,
    seed_llama,
    seed_voken,
    slot_mllm,
    tar,
    tar_system,
    titok,
    tokenflow,
    uniflow,
    unitok,
    xomni,
    xomni_lm,
    xomni_system,
)
from unimm.conversion.upstream import Upstream

UPSTREAMS: dict[str, Upstream] = {
    upstream.system: upstream
    for upstream in (
        llamagen.VQ,
        seed_voken.IBQ,
        seed_voken.OPEN_MAGVIT2,
        titok.TITOK_TWO_STAGE,
        titok.TITOK_SINGLE_STAGE,
        titok.TA_TITOK,
        titok.ONE_D_PIECE,
        xomni.TOKENIZER,
        xomni_lm.LANGUAGE_MODEL,
        xomni_system.SYSTEM,
        tar.TA_TOK,
        seed.TOKENIZER,
        flextok.TOKENIZER,
        gigatok.TOKENIZER,
        restok.TOKENIZER,
        lavit.TOKENIZER,
        fqgan.DUAL,
        fqgan.TRIPLE,
        instella.TOKENIZER,
        atoken.TOKENIZER,
        omnitokenizer.TOKENIZER,
        mingtok.TOKENIZER,
        evotok.TOKENIZER,
        dualtoken.TOKENIZER,
        dualvitok.TOKENIZER,
        tokenflow.TOKENIZER,
        uniflow.TOKENIZER,
        karl.TOKENIZER,
        comit.TOKENIZER,
        slot_mllm.QUERIES,
        unitok.UNITOK,
        unitok.MEDITOK,
        seed_llama.SEED_LLAMA_8B,
        seed_llama.SEED_LLAMA_14B,
        lavit_system.SYSTEM,
        tar_system.SYSTEM,
    )
}


def find_upstream(name: str) -> Upstream:
    """The upstream of a system's name or alias, whatever its case and dashes.

    Raises:
        ValueError: there is none, with the nearest names.
    """
    names = {alias: upstream for upstream in UPSTREAMS.values() for alias in (upstream.system, *upstream.aliases)}
    wanted = name.lower().replace("-", "_")
    if wanted not in names:
        hint = did_you_mean(wanted, names, cutoff=0.5)
        raise ValueError(f"No converter for {name!r}; there are {', '.join(UPSTREAMS)}.{hint}")
    return names[wanted]
