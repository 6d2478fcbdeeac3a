package plan

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
)

// What apply admits, an edge can serve, once the files can be read: otherwise it
// would be held back on every edge of the fleet.
func TestRulesAdmitWhatCompiles(t *testing.T) {
	drawn := newDrawn(t)
	admitted := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		snapshot := drawn.configuration(t)
		for _, resource := range snapshot.All() {
			admitted[resource.Kind()]++
		}
		_, violations := Compile(snapshot, Env{ReadFile: drawn.read})
		for _, violation := range violations {
			t.Errorf("admitted, and refused by the edge: %s\n%v", violation.Text(),
				snapshot.Get(violation.GetResource().GetKind(), violation.GetResource().GetName()))
		}
	})
	for _, kind := range resealv1.Kinds {
		if admitted[kind] == 0 {
			t.Errorf("no %s was ever admitted, so nothing is known of them", kind)
		}
	}
	t.Log(admitted)
}

// drawn draws resources from values that are likely to be right, or nearly so.
type drawn struct {
	chain, key, ca, crl string
	strings             map[string][]string // by the field's name
}

func newDrawn(t *testing.T) *drawn {
	ca := newAuthority(t)
	d := &drawn{ca: ca.pem, crl: ca.revoke()}
	d.chain, d.key, _ = ca.issue(leafOptions{names: []string{"app.test"}})
	names := []string{"a", "b"}
	hosts := []string{"", "app.test", "App.test", "app.test.", "*.app.test", "10.0.0.1", "::1", "a_b.test", "x", "1.2.3", "*.1"}
	d.strings = map[string][]string{
		"address":    {"10.0.0.1:443", ":443", "127.0.0.1:443", "[::1]:443", "app.test:443", "[::]:444", "App.test:0", ":0", "443"},
		"tls_policy": names, "policy": names, "pool": names, "certificates": names, "listeners": names,
		"client_certificate": names, "name": {"a", "b", "app.test", "app.test."}, "keyring": {"", "default", "a"},
		"server_name": hosts, "hosts": hosts, "subject_alt_names": append(hosts, "spiffe://a/b", "urn:a:b", "a:1"),
		"alpn": {"h2", "http/1.1", "mqtt"}, "curves": {"X25519", "P256", "X25519MLKEM768", "P1"},
		"cipher_suites": {"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256", "TLS_RSA_WITH_RC4_128_SHA"},
		"ca_pem":        {d.ca, "\ufeff" + d.ca, d.ca + d.ca, ""}, "crl_pem": {d.crl, ""},
		"certificate_pem": {d.chain, "\ufeff" + d.chain}, "private_key_pem": {d.key, "\ufeff" + d.key},
		"certificate_file": {"/chain"}, "private_key_file": {"/key"}, "ca_file": {"/ca", "ca"},
		"path": {"/", "up", "/a%20b"}, "prefix": {"/", "/a"}, "exact": {"/a", ""}, "method": {"GET", "HEAD", "POST"},
		"hash_on": {"", "host", "source_ip", "header:X-A", "cookie:a", "query"}, "trusted_cidrs": {"10.0.0.0/8", "::/0", "10.0.0.1"},
		"remove_headers": {"X-A", "X-*", "Host"}, "keep_headers": {"X-Real-IP", "X-SSL-Client-*", "Client-Cert"},
		"set": {"X-A", "Host", "a b"}, "add": {"X-B"}, "remove": {"X-C", "Upgrade"},
	}
	return d
}

func (d *drawn) read(name string) ([]byte, error) {
	content := map[string]string{"/chain": d.chain, "/key": d.key, "/ca": d.ca}[name]
	if content == "" {
		return nil, errors.New("no such file")
	}
	return []byte(content), nil
}

// configuration is one that apply admits: what is drawn, without what it refuses.
func (d *drawn) configuration(t *rapid.T) *resealv1.Snapshot {
	var resources []*resealv1.Resource
	for _, kind := range resealv1.Kinds {
		names := []string{"a", "b"}
		if kind == "RolloutPolicy" {
			names = []string{resealv1.DefaultRollout} // others are refused
		}
		for _, name := range names {
			for try := range 12 {
				resource := resealv1.NewResource(kind)
				resource.Metadata = &resealv1.Metadata{Name: name, Uid: "uid-" + name}
				d.fill(t, resource.SpecMessage(), fmt.Sprint(kind, "/", name, try))
				c := resource.GetCertificate()
				noKey := c.GetCertificatePem() != "" && c.GetPrivateKeyPem() == "" // of a stored one
				if !noKey && len(rules.Written(resource)) == 0 {
					resources = append(resources, resource)
					break
				}
			}
		}
	}
	snapshot := resealv1.NewSnapshot("c", 1, resources)
	for violations := rules.Configuration(snapshot); len(violations) > 0; violations = rules.Configuration(snapshot) {
		snapshot = snapshot.With(1, nil, []*resealv1.ResourceRef{violations[0].GetResource()})
	}
	return snapshot
}

// fill draws each field, most of them absent.
func (d *drawn) fill(t *rapid.T, m protoreflect.Message, label string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		label := label + "." + string(field.Name())
		if oneof := field.ContainingOneof(); oneof != nil && m.WhichOneof(oneof) != nil {
			continue
		}
		if field.Message() != nil && field.Message().FullName() == "reseal.v1.EdgeSelector" {
			continue // all resources are of one edge
		}
		often := map[string]int{"address": 9, "certificates": 9, "endpoints": 8, "listeners": 9, "pools": 9, "name": 10,
			"certificate_pem": 5, "private_key_pem": 9, "certificate_file": 5, "private_key_file": 9}[string(field.Name())]
		if rapid.IntRange(0, 9).Draw(t, label+"?") >= max(often, 1) {
			continue
		}
		switch {
		case field.IsMap():
			entries := m.Mutable(field).Map()
			key := rapid.SampledFrom(d.words(field)).Draw(t, label)
			entries.Set(protoreflect.ValueOfString(key).MapKey(), protoreflect.ValueOfString("v"))
		case field.IsList():
			list := m.Mutable(field).List()
			for i := range rapid.IntRange(1, 2).Draw(t, label+"#") {
				list.Append(d.value(t, field, list.NewElement, fmt.Sprint(label, i)))
			}
		default:
			m.Set(field, d.value(t, field, func() protoreflect.Value { return m.NewField(field) }, label))
		}
	}
}

func (d *drawn) words(field protoreflect.FieldDescriptor) []string {
	if words := d.strings[string(field.Name())]; words != nil {
		return words
	}
	return []string{"a", "b", ""}
}

func (d *drawn) value(t *rapid.T, field protoreflect.FieldDescriptor, empty func() protoreflect.Value, label string) protoreflect.Value {
	switch field.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(rapid.SampledFrom(d.words(field)).Draw(t, label))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(rapid.Bool().Draw(t, label))
	case protoreflect.EnumKind:
		values := field.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(rapid.IntRange(0, values.Len()-1).Draw(t, label)).Number())
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(rapid.SampledFrom([]uint32{0, 1, 2, 100, 443, 1000, 1 << 31}).Draw(t, label))
	case protoreflect.MessageKind:
		value := empty()
		if value.Message().Descriptor().FullName() == "google.protobuf.Duration" {
			d := rapid.SampledFrom([]time.Duration{0, time.Millisecond, time.Second, time.Hour, 200 * time.Hour}).Draw(t, label)
			return protoreflect.ValueOfMessage(durationpb.New(d).ProtoReflect())
		}
		d.fill(t, value.Message(), label)
		return value
	}
	panic("draw a " + field.Kind().String() + " for " + string(field.FullName()))
}

// An edge of an older version serves resources of a newer control plane.
func TestUnknownFieldsAreNoReason(t *testing.T) {
	newer := named("p", pool("10.0.0.1:1"))
	newer.GetBackendPool().ProtoReflect().SetUnknown([]byte{0xf8, 0x3e, 1})
	if len(rules.Written(proto.CloneOf(newer))) != 1 {
		t.Error("an unknown field is admitted by apply")
	}
	mustCompile(t, newer)
}
