package manifest

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/descriptorpb"
)

func TestExplain(t *testing.T) {
	got, err := Explain("pools.connections.REUSE")
	if err != nil {
		t.Fatal(err)
	}
	want := Doc{
		Path: "BackendPool.connections.reuse", Type: "enum",
		Comment: "When a request may use an idle connection. Default: always. The modes are those of HAProxy's http-reuse, " +
			"with two differences: of several idle connections a request takes the one used last, not first, so that those " +
			"that are not needed end; and the first request of an HTTP/2 client counts as first. In every mode a connection on " +
			"which a client logs in by NTLM or Negotiate serves that client connection alone and ends with it.",
		Values: []DocValue{
			{"always", "Any request may use any idle connection of its identity."},
			{"aggressive", "The first request of a client connection only uses connections that have already been reused once, or HTTP/2 connections that have answered once."},
			{"safe", "The first request of a client connection uses a new connection; later ones any idle one. An HTTP/2 connection in use serves one client connection only."},
			{"never", "A connection serves one client connection only, and is closed within a second of its end."},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("doc (-want +got):\n%s", diff)
	}
}

func TestExplainPaths(t *testing.T) {
	for path, want := range map[string]string{
		"bp":                               "BackendPool object",
		"pool.spec":                        "BackendPool object",
		"pool.spec.endpoints[0].weight":    "BackendPool.endpoints.weight integer",
		"BackendPool.endpoints":            "BackendPool.endpoints list of object",
		"pool.tls.trust.caPem":             "BackendPool.tls.trust.caPem string",
		"pool.tls.insecureSkipVerify":      "BackendPool.tls.insecureSkipVerify boolean",
		"pool.healthCheck.interval":        "BackendPool.healthCheck.interval duration",
		"pool.retries.on":                  "BackendPool.retries.on list of enum",
		"listener.edgeSelector":            "Listener.edgeSelector object",
		"keyring.edgeSelector.matchLabels": "Keyring.edgeSelector.matchLabels map to string",
		"route.metadata.name":              "Route.metadata.name string",
		"route.metadata.createdAt":         "Route.metadata.createdAt time",
		"policies.minVersion":              "TLSPolicy.minVersion enum",
	} {
		doc, err := Explain(path)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if got := doc.Path + " " + doc.Type; got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	if doc, err := Explain("cert.privateKeyPem"); err != nil || !doc.Secret {
		t.Errorf("a private key is secret: %v, %v", doc.Secret, err)
	}
	if doc, err := Explain("cert.metadata.uid"); err != nil || !doc.Assigned {
		t.Errorf("a uid is assigned: %v, %v", doc.Assigned, err)
	}
}

func TestExplainRefuses(t *testing.T) {
	for path, want := range map[string]string{
		"":                  `"" is not a kind; it is one of BackendPool, TLSPolicy, Listener, Route, Certificate, Keyring or RolloutPolicy`,
		"BackendPol":        `"BackendPol" is not a kind; did you mean "BackendPool"?`,
		"pool.conections":   `BackendPool has no field "conections"; did you mean "connections"?`,
		"keyring.colour":    `Keyring has no field "colour"; it has rotationInterval, retireAfter, maxActiveAge, edgeSelector`,
		"pool.dns.name.x":   `BackendPool.dns.name has no fields`,
		"listener.pool.[0]": "",
		"listener.[0]":      "Listener is not a list",
	} {
		_, err := Explain(path)
		if want == "" {
			if err != nil {
				t.Errorf("%q: %v", path, err)
			}
			continue
		}
		if !errors.Is(err, ErrNotDocumented) || !strings.HasSuffix(err.Error(), ": "+want) {
			t.Errorf("%q: %v, want %s", path, err, want)
		}
	}
}

// Everything that a manifest can hold has a comment that Explain finds.
func TestExplainCoversEverything(t *testing.T) {
	count := 0
	var walk func(path string, doc Doc)
	walk = func(path string, doc Doc) {
		count++
		if doc.Comment == "" {
			t.Errorf("%s has no comment", path)
		}
		// What a field is for comes before its default, in more than a word.
		if first, _, _ := strings.Cut(doc.Comment, "\n\n"); len(strings.Fields(first)) < 3 ||
			strings.HasPrefix(first, "Default") || strings.HasPrefix(first, "Bounds") || strings.HasPrefix(first, "One of them") {
			t.Errorf("%s is explained as %q, which says nothing", path, first)
		}
		for _, value := range doc.Values {
			if value.Name == "" || value.Comment == "" {
				t.Errorf("%s: value %+v is not documented", path, value)
			}
		}
		for _, field := range doc.Fields {
			below, err := Explain(path + "." + field.Name)
			if err != nil {
				t.Errorf("%s.%s: %v", path, field.Name, err)
				continue
			}
			walk(below.Path, below)
		}
	}
	for _, kind := range resealv1.Kinds {
		doc, err := Explain(kind)
		if err != nil {
			t.Fatal(err)
		}
		walk(kind, doc)
	}
	if count < 100 {
		t.Errorf("only %d kinds and fields", count)
	}
}

// The embedded descriptors are those of the generated code; otherwise they have
// to be generated again.
func TestDescriptorSetIsCurrent(t *testing.T) {
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(descriptorSet, &set); err != nil {
		t.Fatal(err)
	}
	embedded := make(map[string]*descriptorpb.FileDescriptorProto)
	for _, file := range set.File {
		file.SourceCodeInfo = nil
		embedded[file.GetName()] = file
	}
	protoregistry.GlobalFiles.RangeFilesByPackage("reseal.v1", func(file protoreflect.FileDescriptor) bool {
		want := protodesc.ToFileDescriptorProto(file)
		if diff := cmp.Diff(want, embedded[file.Path()], protocmp.Transform()); diff != "" {
			t.Errorf("%s is not current, run `make generate` (-generated +embedded):\n%s", file.Path(), diff)
		}
		delete(embedded, file.Path())
		return true
	})
	for name := range embedded {
		if strings.HasPrefix(name, "reseal/") {
			t.Errorf("%s has no generated code", name)
		}
	}
}
