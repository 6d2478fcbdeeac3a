package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

// samplePool has every kind of value, and what the control plane assigns.
func samplePool() *resealv1.Resource {
	r := poolOf("jetty", &resealv1.BackendPool{
		Endpoints: []*resealv1.Endpoint{{Address: "10.0.0.1:8443", Weight: new(uint32(0))}, {Address: "[::1]:443"}},
		Protocol:  resealv1.BackendPool_PROTOCOL_HTTP2,
		Tls: &resealv1.BackendTLS{
			Trust:              &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: "-----BEGIN X-----\nAAAA\n-----END X-----\n"}},
			InsecureSkipVerify: true,
		},
		Sessions:    &resealv1.Sessions{Mode: resealv1.Sessions_MODE_OFF, CoalesceTimeout: seconds(0.25)},
		Connections: &resealv1.Connections{},
		HealthCheck: &resealv1.HealthCheck{ExpectedStatuses: []uint32{200, 404}, Interval: seconds(3600)},
		Retries:     &resealv1.Retries{On: []resealv1.Retries_Condition{resealv1.Retries_CONDITION_502}},
	})
	r.Metadata = &resealv1.Metadata{
		Name: "jetty", Labels: map[string]string{"tier": "1", "app": "web"}, Annotations: map[string]string{"note": "a: b"},
		Uid: "u-1", Generation: 2, Revision: 42,
		CreatedAt: timestamppb.New(time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)),
		UpdatedAt: timestamppb.New(time.Date(2026, 1, 2, 4, 4, 5, 0, time.UTC)),
	}
	return r
}

const sampleYAML = `apiVersion: reseal/v1
kind: BackendPool
metadata:
  name: jetty
  labels:
    app: web
    tier: "1"
  annotations:
    note: 'a: b'
  uid: u-1
  generation: 2
  revision: 42
  createdAt: "2026-01-02T03:04:05Z"
  updatedAt: "2026-01-02T04:04:05Z"
spec:
  endpoints:
    - address: 10.0.0.1:8443
      weight: 0
    - address: '[::1]:443'
  protocol: http2
  tls:
    trust:
      caPem: |
        -----BEGIN X-----
        AAAA
        -----END X-----
    insecureSkipVerify: true
  sessions:
    mode: "off"
    coalesceTimeout: 250ms
  connections: {}
  healthCheck:
    expectedStatuses:
      - 200
      - 404
    interval: 1h
  retries:
    "on":
      - "502"
`

func TestFormatYAML(t *testing.T) {
	var text strings.Builder
	if err := FormatYAML(&text, samplePool()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sampleYAML, text.String()); diff != "" {
		t.Errorf("YAML (-want +got):\n%s", diff)
	}
	text.Reset()
	keyring := resealv1.NewResource("Keyring")
	keyring.Metadata.Name = "k"
	if err := (Format{OmitAssigned: true}).YAML(&text, samplePool(), keyring); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text.String(), "uid") || strings.Contains(text.String(), "createdAt") {
		t.Errorf("assigned metadata is there:\n%s", text.String())
	}
	if !strings.HasSuffix(text.String(), "---\napiVersion: reseal/v1\nkind: Keyring\nmetadata:\n  name: k\nspec: {}\n") {
		t.Errorf("second document:\n%s", text.String())
	}
	if err := FormatYAML(&text, &resealv1.Resource{}); err == nil {
		t.Error("a resource without spec is written")
	}
}

func TestFormatJSON(t *testing.T) {
	var text strings.Builder
	route := &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: "r", Revision: 7},
		Spec: &resealv1.Resource_Route{Route: &resealv1.Route{
			Listeners: []string{"web"}, Hosts: []string{"<&>\u2028\U000E0001"},
		}},
	}
	if err := FormatJSON(&text, route); err != nil {
		t.Fatal(err)
	}
	const want = `{
  "apiVersion": "reseal/v1",
  "kind": "Route",
  "metadata": {
    "name": "r",
    "revision": 7
  },
  "spec": {
    "listeners": [
      "web"
    ],
    "hosts": [
      "<&>\u2028\udb40\udc01"
    ]
  }
}
`
	if diff := cmp.Diff(want, text.String()); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
	for _, resources := range [][]*resealv1.Resource{nil, {route, samplePool()}} {
		text.Reset()
		if err := FormatJSON(&text, resources...); err != nil {
			t.Fatal(err)
		}
		var list struct {
			Kind  string
			Items []any
		}
		if err := json.Unmarshal([]byte(text.String()), &list); err != nil {
			t.Fatal(err)
		}
		if list.Kind != "List" || len(list.Items) != len(resources) || list.Items == nil {
			t.Errorf("list of %d is %+v", len(resources), list)
		}
	}
	if err := FormatJSON(&text, &resealv1.Resource{}); err == nil {
		t.Error("a resource without spec is written")
	}
}

func TestFormatRedacted(t *testing.T) {
	cert := certificateOf("web", &resealv1.Certificate{CertificatePem: "c", PrivateKeyPem: resealv1.SecretMarker})
	var all, omitted strings.Builder
	if err := errors.Join(FormatYAML(&all, cert), Format{OmitRedacted: true}.YAML(&omitted, cert)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(all.String(), "privateKeyPem: <redacted>\n") {
		t.Errorf("the marker is missing:\n%s", all.String())
	}
	if strings.Contains(omitted.String(), "privateKeyPem") || !strings.Contains(omitted.String(), "certificatePem: c\n") {
		t.Errorf("the marker is not left out:\n%s", omitted.String())
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestFormatReportsWriteErrors(t *testing.T) {
	for name, err := range map[string]error{
		"YAML": FormatYAML(failingWriter{}, samplePool()),
		"JSON": FormatJSON(failingWriter{}, samplePool()),
	} {
		if err == nil || !strings.Contains(err.Error(), "disk full") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// drawMessage fills a message with anything that a manifest can hold.
func drawMessage(t *rapid.T, m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if isAssigned(field) || rapid.IntRange(0, 2).Draw(t, "set") == 0 {
			continue
		}
		switch {
		case field.IsMap():
			entries := m.Mutable(field).Map()
			for key, value := range rapid.MapOfN(drawText(), drawText(), 0, 3).Draw(t, "map") {
				entries.Set(protoreflect.ValueOfString(key).MapKey(), protoreflect.ValueOfString(value))
			}
		case field.IsList():
			list := m.Mutable(field).List()
			for range rapid.IntRange(0, 3).Draw(t, "items") {
				list.Append(drawValue(t, field, list.NewElement))
			}
		default:
			m.Set(field, drawValue(t, field, func() protoreflect.Value { return m.NewField(field) }))
		}
	}
}

func drawValue(t *rapid.T, field protoreflect.FieldDescriptor, newValue func() protoreflect.Value) protoreflect.Value {
	switch field.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(drawText().Draw(t, "text"))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(rapid.Bool().Draw(t, "bool"))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(rapid.Uint32().Draw(t, "number"))
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(rapid.IntRange(1, field.Enum().Values().Len()-1).Draw(t, "enum")))
	}
	if rules.IsDuration(field) {
		nanoseconds := rapid.Int64Range(0, 1<<62).Draw(t, "duration")
		scale := rapid.SampledFrom([]int64{1, int64(time.Millisecond), int64(time.Second), int64(time.Minute), int64(time.Hour)}).Draw(t, "scale")
		return protoreflect.ValueOfMessage(durationpb.New(time.Duration(nanoseconds / scale * scale)).ProtoReflect())
	}
	value := newValue()
	drawMessage(t, value.Message())
	return value
}

func drawText() *rapid.Generator[string] {
	return rapid.OneOf(
		rapid.StringMatching(`[a-z0-9.-]{0,12}`),
		rapid.String(),
		rapid.StringOf(rapid.SampledFrom([]rune(" \n\t\r:#-'\"\\{}[]&*!|>%@`,?~=<y0\x00\x7f\u0085\u2028\ufeff\U0001F600"))),
		rapid.SampledFrom([]string{"true", "null", "~", "1", "1e3", "0x10", "1_000", "2024-01-02", "<<", "=", "yes", "On", "1:20", "---", "...", "- a", "a: b", "a #b", "| x"}),
	)
}

func drawResource(t *rapid.T) *resealv1.Resource {
	r := resealv1.NewResource(rapid.SampledFrom(resealv1.Kinds).Draw(t, "kind"))
	drawMessage(t, r.Metadata.ProtoReflect())
	r.Metadata.Name = rapid.StringMatching(`[a-z][a-z0-9]{0,8}`).Draw(t, "name")
	drawMessage(t, r.SpecMessage())
	return r
}

func TestFormatRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawResource(t)
		for name, format := range map[string]func(*bytes.Buffer) error{
			"yaml": func(w *bytes.Buffer) error { return FormatYAML(w, r) },
			"json": func(w *bytes.Buffer) error { return FormatJSON(w, r) },
		} {
			var text bytes.Buffer
			if err := format(&text); err != nil {
				t.Fatal(err)
			}
			objects, err := parse(name, text.Bytes(), false)
			if err != nil {
				t.Fatalf("%v in\n%s", err, text.String())
			}
			if len(objects) != 1 || !proto.Equal(r, objects[0].Resource) {
				t.Fatalf("%s reads back as (-want +got):\n%s\nfrom\n%s", name, cmp.Diff(r, objects[0].Resource, protocmp.Transform()), text.String())
			}
		}
	})
}

func TestFormatListRoundTrip(t *testing.T) {
	resources := []*resealv1.Resource{samplePool(), resealv1.NewResource("Keyring")}
	resources[1].Metadata.Name = "k"
	var asYAML, asJSON bytes.Buffer
	if err := errors.Join(FormatYAML(&asYAML, resources...), FormatJSON(&asJSON, resources...)); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{asYAML.String(), asJSON.String()} {
		objects, err := parse("f", []byte(text), false)
		if err != nil || len(objects) != 2 {
			t.Fatalf("%d objects, %v", len(objects), err)
		}
		want := proto.CloneOf(resources[0])
		want.Metadata = &resealv1.Metadata{Name: "jetty", Labels: want.Metadata.Labels, Annotations: want.Metadata.Annotations}
		if diff := cmp.Diff(want, objects[0].Resource, protocmp.Transform()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}

func TestDurationText(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"0s": 0, "250ms": 250 * time.Millisecond, "1s": time.Second, "10s": 10 * time.Second, "1m": time.Minute,
		"1m30s": 90 * time.Second, "1h": time.Hour, "1h0m30s": time.Hour + 30*time.Second, "10h10m": 10*time.Hour + 10*time.Minute,
		"168h": 7 * 24 * time.Hour, "100h": 100 * time.Hour, "1.5s": 1500 * time.Millisecond,
	} {
		if got := rules.DurationText(d); got != want {
			t.Errorf("%v is %s, want %s", d, got, want)
		}
		if back, err := time.ParseDuration(want); err != nil || back != d {
			t.Errorf("%s reads as %v, %v", want, back, err)
		}
	}
}
