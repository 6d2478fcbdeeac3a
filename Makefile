# Reseal. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# Pinned tools, built from source into .tools; `make run` and `make test` need none of them.
BUF           := github.com/bufbuild/buf/cmd/buf@v1.75.0
PROTOC_GEN_GO := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
H2SPEC        := github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

TOOLS   := $(CURDIR)/.tools
BIN     := $(CURDIR)/bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 20s
BASE    ?= main

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the three static binaries into bin/
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

.PHONY: run
run: ## Start a control plane, two edges and a TLS backend, send traffic, show the statistics; Ctrl-C ends all
	@mkdir -p $(BIN) && CGO_ENABLED=0 go build -o $(BIN)/ ./cmd/... ./integration/demo
	@exec $(BIN)/demo -bin $(BIN) -examples deploy/examples

# -count 1: the cache of go test knows nothing of the binaries that integration builds.
.PHONY: test
test: ## Install what the tests need (Debian packages, only when missing) and run all tests with the race detector
	integration/setup.sh
	go test -race -timeout 30m -count 1 ./...

.PHONY: race
race: ## Run the unit and component tests with the race detector, without integration/
	go test -race $$(go list ./... | grep -v /integration)

.PHONY: integration
integration: ## Run the tests against real peers and processes
	integration/setup.sh
	go test -race -timeout 30m -count 1 -v ./integration/...

.PHONY: containers
containers: ## Run the tests between containers (needs a Docker engine)
	go test -timeout 20m -count 1 -v -run 'TestContainers' ./integration/containers/...

.PHONY: images
images: ## Build the container images from the static binaries
	deploy/images.sh $(VERSION)

.PHONY: bench
bench: ## Measure what requests cost Reseal, HAProxy and nginx, and put the table into README.md (long; see bench-short)
	integration/setup.sh
	integration/bench/peers.sh
	go run ./integration/bench/cost -linear -readme README.md

.PHONY: bench-short
bench-short: ## The same in two minutes, with fewer rounds, for the terminal
	integration/setup.sh
	integration/bench/peers.sh || true
	go run ./integration/bench/cost -short

.PHONY: bench-go
bench-go: ## Run the benchmarks of the packages
	go test -run '^$$' -bench . -benchmem ./...

.PHONY: bench-sessions
bench-sessions: ## Count full handshakes at the backend with Reseal, HAProxy and nginx in one run (long)
	integration/setup.sh
	go run ./integration/bench/sessions -requests 50000 -peers -markdown
	RESEAL_LONG=1 go test -timeout 60m -v -run Million ./integration/bench

EDGES ?= 250,1000,2500,5000,10000

.PHONY: bench-fleet
bench-fleet: ## Measure what EDGES simulated edges cost a control plane, without and with much configuration (long)
	go run ./integration/bench/fleet -edges $(EDGES)
	go run ./integration/bench/fleet -edges $(EDGES) -realistic

.PHONY: fuzz
fuzz: ## Fuzz each parser for FUZZTIME
	@set -e; for p in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
	    go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$p; done; done

.PHONY: fuzz-peers
fuzz-peers: ## Send the same bytes to Reseal, HAProxy and nginx for FUZZTIME, and look for requests that only Reseal sees
	integration/setup.sh
	RESEAL_FUZZ_PEERS=$(FUZZTIME) go test -count 1 -timeout 0 -v -run '^(TestFraming|TestFuzzPeers)$$' ./integration/framing

.PHONY: h2spec
h2spec: ## Check edge/http2, and an edge, by h2spec, the conformance tests of HTTP/2
	@$(MAKE) -s tool TOOL=$(H2SPEC)
	RESEAL_H2SPEC=$(TOOLS)/bin/h2spec go test -count 1 -v -run '^TestH2spec$$' ./edge/http2 ./edge

.PHONY: fmt
fmt: tools ## Format Go and proto files
	gofmt -w $$(git ls-files '*.go' | grep -v '\.pb\.go$$')
	$(TOOLS)/bin/buf format -w

.PHONY: lint
lint: tools lint-tool ## Lint Go and proto files
	$(TOOLS)/bin/buf lint
	$(TOOLS)/bin/golangci-lint run ./...

.PHONY: breaking
breaking: tools ## Check that the protocol has not broken since BASE
	$(TOOLS)/bin/buf breaking --against '.git#branch=$(BASE)'

.PHONY: generate
generate: tools ## Generate the Go code and the descriptor set from the proto files
	PATH=$(TOOLS)/bin:$$PATH $(TOOLS)/bin/buf generate --template proto/buf.gen.yaml
	$(TOOLS)/bin/buf build -o proto/manifest/reseal.binpb --as-file-descriptor-set --exclude-imports

.PHONY: checkgenerate
checkgenerate: generate ## Fail when generated files are not up to date
	@git diff --exit-code --stat -- proto || { echo 'generated code is not up to date: run `make generate` and commit'; exit 1; }
	@test -z "$$(git ls-files --others --exclude-standard proto)" || { echo 'generated files are not committed:'; git ls-files --others --exclude-standard proto; exit 1; }

.PHONY: tools
tools:
	@for t in $(BUF) $(PROTOC_GEN_GO) $(PROTOC_GEN_GRPC); do $(MAKE) -s tool TOOL=$$t; done

.PHONY: lint-tool
lint-tool:
	@$(MAKE) -s tool TOOL=$(GOLANGCI_LINT)

# A stamp per tool and version, so that a new pin installs and an old one does not.
.PHONY: tool
tool:
	@stamp=$(TOOLS)/stamp/$(subst /,_,$(TOOL)); if [ ! -e $$stamp ]; then \
	  echo "building $(TOOL)"; GOBIN=$(TOOLS)/bin go install $(TOOL) && mkdir -p $(TOOLS)/stamp && touch $$stamp; fi

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BIN) $(TOOLS)
