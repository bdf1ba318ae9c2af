"""Make the buckets named as arguments, where they are missing, on the S3 server that AWS_ENDPOINT_URL names."""

import sys

import boto3


def main(names: list[str]) -> None:
    """Make those of ``names`` that aren't there; raises what boto3 does when the server refuses."""
    s3 = boto3.client("s3")
    standing = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for name in names:
        if name not in standing:
            s3.create_bucket(Bucket=name)


if __name__ == "__main__":
    main(sys.argv[1:])
