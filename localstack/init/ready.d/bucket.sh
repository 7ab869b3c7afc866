#!/usr/bin/env bash
# Run by LocalStack's container when it is ready: the bucket (BUCKET, by compose.yaml) and the role that cloud.py makes.
set -euo pipefail
awslocal s3 mb "s3://$BUCKET"
awslocal iam create-role --role-name SageMakerExecutionRole --assume-role-policy-document \
  '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}]}'
awslocal iam attach-role-policy --role-name SageMakerExecutionRole --policy-arn arn:aws:iam::aws:policy/AmazonSageMakerFullAccess
