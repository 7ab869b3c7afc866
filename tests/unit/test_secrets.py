"""What looks like a secret is found and taken out; what only looks long is not."""

from __future__ import annotations

import base64
import re
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.secrets import kind_of_token, looks_like_token, redact
from trimtab.spec import TrainSpec

ROOT = Path(__file__).parents[2]
LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 10

# put together here, so that no scanner takes this file for a leak
SECRETS = {
    "Hugging Face token": ["hf_" + LETTERS[:34], "api_org_" + LETTERS[:34]],
    "AWS access key id": ["AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "Y34FZKBOKMUTVV7A"],
    "AWS secret key": [LETTERS[:20] + "/+" + LETTERS[:18]],
    "AWS session token": ["IQoJb3JpZ2lu" + LETTERS[:200], "FwoGZXIvYXdz" + LETTERS[:100] + "=="],
    "GitHub token": [prefix + LETTERS[:36] for prefix in ("ghp_", "gho_", "ghs_", "ghu_", "ghr_")]
    + ["github_pat_" + LETTERS[:22] + "_" + LETTERS[:59]],
    "GitLab token": ["glpat-" + LETTERS[:20], "glpat-" + LETTERS[:9] + "-_" + LETTERS[:9]],
    "API key": [
        "sk-" + LETTERS[:48],
        "sk-proj-" + LETTERS[:20] + "-_" + LETTERS[:60],
        "sk-ant-" + "api03-" + LETTERS[:93],
        "sk-" + "0123456789abcdef" * 2,
    ],
    "Slack token": ["xoxb-" + "123456789012-" + LETTERS[:24], "xapp-1-" + LETTERS[:40]],
    "Google key": ["AIza" + LETTERS[:35], "ya29." + LETTERS[:60], "GOCSPX-" + LETTERS[:28]],
    "JSON web token": ["eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + LETTERS[:43]],
    "npm token": ["npm_" + LETTERS[:36]],
    "PyPI token": ["pypi-AgEI" + "cHlwaS5vcmc" + LETTERS[:120]],
}
IN_CONTEXT = {
    "AWS secret key": ["aws_secret_access_key = {}", 'SecretAccessKey": "{}"', "AWS_SECRET_ACCESS_KEY={}", "secretKey: '{}'"],
    "AWS session token": ["AWS_SESSION_TOKEN={}", '"SessionToken": "{}"', "x-amz-security-token: {}", "{}"],
}
CONTEXTS = [
    "{}",
    "token={}",
    '"{}"',
    "Authorization: Bearer {}",
    "https://host/path?t={}&x=1",
    "see {}, please",
    "\x1b[31m{}\x1b[0m",
    "({})",
    "--token {}\n",
    r"line\n{}",
    "a%3D{}",
]
CASES = [(kind, secret, place) for kind, secrets in SECRETS.items() for secret in secrets for place in IN_CONTEXT.get(kind, CONTEXTS)]


@pytest.mark.parametrize(("kind", "secret", "place"), CASES, ids=[f"{kind}-{number}" for number, (kind, *_) in enumerate(CASES)])
def test_a_secret_is_found_and_taken_out_wherever_it_stands(kind, secret, place):
    text = place.format(secret)
    assert looks_like_token(text)
    clean = redact(text)
    assert secret not in clean
    assert secret[-12:] not in clean
    assert f"[redacted: {kind}]" in clean or "[redacted: " in clean
    before, after = place.split("{}")
    assert clean.startswith(before.rstrip(" "))
    assert clean.endswith(after)


@pytest.mark.parametrize(
    ("text", "secret", "kind"),
    [
        ("Authorization: Bearer " + LETTERS[:40], LETTERS[:40], "Authorization header"),
        (
            "{'authorization': 'Basic " + base64.b64encode(b"aladdin:opensesame").decode() + "'}",
            "YWxhZGRpbjpvcGVuc2VzYW1l",
            "Authorization header",
        ),
        ("HTTPS_PROXY=http://ada:" + "s3cret@proxy.example:3128", "s3cret", "password in a URL"),
        ("postgresql://app:" + "p%40ss@[::1]:5432/db", "p%40ss", "password in a URL"),
        ("https://:" + "onlyapassword@host/", "onlyapassword", "password in a URL"),
        ("WANDB_API_KEY=" + "0123456789abcdef01234567" * 2, "0123456789abcdef", "password or key by its name"),
        ('{"password": "' + "correct-horse-7-battery" + '"}', "battery", "password or key by its name"),
        ("https://b.s3.amazonaws.com/k?X-Amz-Expires=60&X-Amz-Signature=" + "0af1" * 16, "0af1" * 16, "signed URL"),
        (
            "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQ\n" * 9 + "-----END PRIVATE KEY-----\nafter",
            "MIIEvQ",
            "private key",
        ),
        ('"-----BEGIN RSA PRIVATE KEY-----\\n' + "MIIEvQIBADAN/bq9+w\\n" * 9 + '-----END RSA PRIVATE KEY-----"', "MIIEvQ", "private key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1rZXktdjE" * 5, "b3Blbn", "private key"),  # cut off
        ("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\n" + "MIIEvQIBADAN" * 9, "MIIEvQ", "private key"),
    ],
)
def test_what_only_its_surroundings_tell(text, secret, kind):
    assert kind_of_token(text) == kind
    assert secret not in redact(text)
    assert f"[redacted: {kind}]" in redact(text)


def test_the_rest_of_a_text_stays_as_it_was():
    text = "before " + SECRETS["Hugging Face token"][0] + " between http://ada:" + "s3cret@h/x?y=1 after\n"
    assert redact(text) == "before [redacted: Hugging Face token] between http://ada:[redacted: password in a URL]@h/x?y=1 after\n"


NOT = [
    "",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709",  # a commit, 40 characters
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "content/9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "550e8400-e29b-41d4-a716-446655440000",
    "arn:aws:iam::111122223333:role/service-role/AmazonSageMaker-ExecutionRole-20260101T000000",
    "arn:aws:kms:us-west-2:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
    "111122223333.dkr.ecr.us-east-1.amazonaws.com/trimtab-xeon-train:0.1.0-9f86d08188",
    "s3://trimtab-us-east-1-111122223333/trimtab/runs/trim-7f3a9c21/output/model/adapter_model.safetensors",
    "https://example.org:8080/path?q=user@example.org",
    "http://localhost:8080",
    "git@github.com:owner/name.git",
    "https://git@github.com/owner/name",
    "postgresql://app:${DB_PASSWORD}@db/x",
    "http://<user>:<password>@proxy",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "meta-llama/Llama-2-13b-chat-hf_quantized",
    "hf_hub_download and hf_model_weights_only_please_and_thank_you",
    "the bearer of this letter",
    "Bearer authentication is described in the documentation",
    "a bearer token-of-some-considerable-length-without-digits",
    "AKIA is a prefix",
    "sk-learn-contrib-imbalanced-learn-documentation",
    "sk-estimator-doc-link fitted sk-text-repr-fallback",
    "task-0123456789abcdef0123456789",
    "eyJhbGciOiJIUzI1NiJ9",  # the header of a token alone
    'if "-----BEGIN PRIVATE KEY-----" in text:',
    "-----BEGIN CERTIFICATE-----\nMIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBa\n-----END CERTIFICATE-----",
    "aws_secret_access_key=None",
    'api_key = os.environ["OPENAI_API_KEY"]',
    "password = get_password_from_the_keyring_of(user)",
    "password=settings.database_2.password_of_the_app",
    "tokens_per_second=1234 hub_token: not given",
    "step=12/400 epoch=0.12 loss=1.2345 lr=7.000e-04 grad_norm=0.512 tokens_per_second=1250 seconds_left=312 memory_mb=2048",
    base64.b64encode(bytes(range(120))).decode(),
]


@pytest.mark.parametrize("text", NOT)
def test_what_is_none_stays(text):
    assert kind_of_token(text) is None
    assert redact(text) == text


@given(st.binary(min_size=1, max_size=64), st.sampled_from(["{}", "sha256:{}", "s3://bucket/{}", "commit {}", "trim-{}", "name={}"]))
def test_digests_and_other_hexadecimal_are_none(data, place):
    assert not looks_like_token(place.format(data.hex()))


@given(st.uuids(), st.integers(0, 10**12 - 1), st.from_regex(r"[a-z][a-z0-9-]{2,30}", fullmatch=True))
def test_identifiers_are_none(uuid, account, name):
    text = f"{uuid} arn:aws:sagemaker:us-east-1:{account:012}:training-job/{name} s3://{name}/{uuid}/ {name}:{uuid.hex}"
    assert redact(text) == text


@given(st.text(max_size=200))
def test_taking_out_is_done_once_and_nothing_is_left(text):
    clean = redact(text)
    assert not looks_like_token(clean)
    assert redact(clean) == clean


@given(st.text(max_size=60), st.sampled_from([case[1] for case in CASES if case[0] not in IN_CONTEXT]), st.text(max_size=60))
def test_a_secret_in_any_text_is_found(before, secret, after):
    text = f"{before} {secret} {after}"
    assert looks_like_token(text)
    assert secret not in redact(text)
    assert not looks_like_token(redact(text))


def test_real_text_raises_no_false_alarm():
    """Sources of the standard library and of this project: all that is found in them are examples of a URL with a password."""
    files = [
        *Path(sysconfig.get_path("stdlib")).glob("*.py"),
        *(file for folder in ("sdk", "entrypoints", "containers", "benchmarks") for file in (ROOT / folder).rglob("*.*")),
        *ROOT.glob("*.md"),
    ]
    found, size = [], 0
    for file in files:
        if file.suffix in (".py", ".md", ".toml", ".txt"):
            text = file.read_text(encoding="utf-8", errors="replace")
            size += len(text)
            found += [(file.name, kind_of_token(line), line.strip()) for line in text.splitlines() if looks_like_token(line)]
    assert size > 4_000_000
    unexplained = [hit for hit in found if hit[1] != "password in a URL" or not re.search(r"passw|secret|:pw@|user", hit[2])]
    assert unexplained == []
    assert len(found) <= 10


@pytest.mark.parametrize(
    "text",
    [
        "sk-" + "a-" * 50_000,
        "password=" + "a" * 100_000 + ".",
        "eyJaaaaaaaaaaaa." * 8_000,
        "a://" * 30_000,
        "https://" + ":" * 50_000,
        "-----BEGIN PRIVATE KEY-----" * 4_000,
        "-----BEGIN " + "A " * 40_000,
        "bearer " * 15_000,
        "hf_" + "a" * 100_000 + "_",
        "api_key=" + "a1" * 50_000 + "-",
        "[31m" * 25_000,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_text_takes_no_time(text):
    begun = time.perf_counter()
    redact(text)
    assert time.perf_counter() - begun < 2  # it is some hundredths of a second; what is not linear takes minutes


@pytest.mark.parametrize("secret", [SECRETS["Hugging Face token"][0], SECRETS["GitHub token"][0], "https://ada:" + "s3cret@hub/model"])
def test_no_hyperparameter_is_a_secret(secret):
    with pytest.raises(SpecError, match="model looks like an access token") as caught:
        TrainSpec(model=secret).to_hyperparameters()
    assert secret not in str(caught.value)
