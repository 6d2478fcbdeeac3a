package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// describer writes "Key: value" lines, aligned within the whole description.
type describer struct {
	w     io.Writer
	lines []describedLine
}

type describedLine struct {
	depth      int
	key, value string
	free       bool // value stands alone
}

func (d *describer) line(depth int, key, value string) {
	d.lines = append(d.lines, describedLine{depth: depth, key: key, value: printable(value)})
}

func (d *describer) heading(depth int, key string) { d.line(depth, key, "") }

func (d *describer) text(depth int, value string) {
	d.lines = append(d.lines, describedLine{depth: depth, value: printable(value), free: true})
}

func (d *describer) labels(key string, labels map[string]string) {
	if len(labels) == 0 {
		d.line(0, key, "<none>")
		return
	}
	for i, pair := range strings.Split(joinLabels(labels), ",") {
		if i > 0 {
			key = ""
		}
		d.line(0, key, pair)
	}
}

// flush writes the lines.
func (d *describer) flush() {
	width := 0
	for _, l := range d.lines {
		if !l.free && l.value != "" {
			width = max(width, 2*l.depth+len(l.key)+1)
		}
	}
	for _, l := range d.lines {
		indent := strings.Repeat("  ", l.depth)
		key := l.key
		if key != "" {
			key += ":"
		}
		switch {
		case l.free:
			fmt.Fprintf(d.w, "%s%s\n", indent, l.value)
		case l.value == "":
			fmt.Fprintf(d.w, "%s%s\n", indent, key)
		default:
			fmt.Fprintf(d.w, "%-*s  %s\n", width, indent+key, l.value)
		}
	}
	d.lines = nil
}

func (d *describer) certificate(c *resealv1.Certificate) {
	leaf, err := leafOf(c)
	if err != nil {
		d.line(0, "Certificate", err.Error())
		return
	}
	d.line(0, "Names", joinSome(certNames(leaf), 20))
	d.line(0, "Issuer", orNone(leaf.Issuer.String()))
	d.line(0, "Serial", leaf.SerialNumber.String())
	d.line(0, "Key", leaf.PublicKeyAlgorithm.String())
	d.line(0, "Valid from", leaf.NotBefore.Local().Format(time.RFC3339))
	d.line(0, "Expires", fmt.Sprintf("%s (%s)", leaf.NotAfter.Local().Format(time.RFC3339), expiry(leaf.NotAfter)))
}

// message writes the fields of full. What set does not hold is a default.
func (d *describer) message(depth int, set, full protoreflect.Message) {
	fields := full.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if !full.Has(field) {
			continue
		}
		isSet := set.IsValid() && set.Has(field)
		key := titleOf(field.JSONName())
		value := full.Get(field)
		switch {
		case field.IsMap():
			d.mapField(depth, key, value.Map())
		case field.IsList():
			d.list(depth, key, field, value.List(), isSet)
		case isNested(field):
			d.heading(depth, key)
			d.message(depth+1, set.Get(field).Message(), value.Message())
		default:
			d.line(depth, key, markDefault(scalarText(field, value), isSet))
		}
	}
}

func (d *describer) mapField(depth int, key string, m protoreflect.Map) {
	d.heading(depth, key)
	var pairs []string
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		pairs = append(pairs, fmt.Sprintf("%s=%s", k.String(), v.String()))
		return true
	})
	slices.Sort(pairs)
	for _, pair := range pairs {
		d.text(depth+1, pair)
	}
}

func (d *describer) list(depth int, key string, field protoreflect.FieldDescriptor, list protoreflect.List, isSet bool) {
	if !isNested(field) {
		items := make([]string, list.Len())
		for i := range items {
			items[i] = scalarText(field, list.Get(i))
		}
		d.line(depth, key, markDefault(strings.Join(items, ", "), isSet))
		return
	}
	d.heading(depth, key)
	for i := range list.Len() {
		item := list.Get(i).Message()
		// One line for an item reads better than a block for each.
		var parts []string
		item.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			parts = append(parts, f.JSONName()+": "+scalarText(f, v))
			return true
		})
		slices.Sort(parts)
		d.text(depth+1, strings.Join(parts, ", "))
	}
}

// isNested says whether a field's values are written as a block.
func isNested(field protoreflect.FieldDescriptor) bool {
	return field.Message() != nil && field.Message().ParentFile().Package() == "reseal.v1"
}

func scalarText(field protoreflect.FieldDescriptor, value protoreflect.Value) string {
	switch {
	case field.Enum() != nil:
		return resealv1.ValueLabel(field.Enum().Values().ByNumber(value.Enum()))
	case field.Message() != nil:
		switch m := value.Message().Interface().(type) {
		case *durationpb.Duration:
			return configured(m)
		case *timestamppb.Timestamp:
			return stamp(m)
		}
		return fmt.Sprint(value.Message().Interface())
	case proto.GetExtension(field.Options(), resealv1.E_Secret).(bool):
		return resealv1.SecretMarker
	case field.Kind() == protoreflect.StringKind && strings.Contains(value.String(), "-----BEGIN "):
		return pemText(value.String())
	}
	return value.String()
}

// pemText says what a PEM text holds instead of repeating it.
func pemText(text string) string {
	certs, err := parseCertificates([]byte(text))
	if err != nil {
		return fmt.Sprintf("PEM, %d bytes", len(text))
	}
	parts := make([]string, len(certs))
	for i, cert := range certs {
		parts[i] = fmt.Sprintf("%s (expires %s)", orNone(cert.Subject.String()), expiry(cert.NotAfter))
	}
	return strings.Join(parts, "; ")
}

func markDefault(text string, isSet bool) string {
	if isSet {
		return text
	}
	return text + " (default)"
}

// initialisms are words that titles write in capitals.
var initialisms = map[string]string{"Ca": "CA", "Tls": "TLS", "Dns": "DNS", "Alpn": "ALPN", "Pem": "PEM", "Crl": "CRL"}

// titleOf turns "serverName" into "Server Name".
func titleOf(jsonName string) string {
	var title strings.Builder
	for i, r := range jsonName {
		switch upper := 'A' <= r && r <= 'Z'; {
		case i == 0:
			title.WriteString(strings.ToUpper(string(r)))
		case upper && jsonName[i-1] >= 'a':
			title.WriteString(" " + string(r))
		default:
			title.WriteRune(r)
		}
	}
	words := strings.Fields(title.String())
	for i, word := range words {
		if capitals, ok := initialisms[word]; ok {
			words[i] = capitals
		}
	}
	return strings.Join(words, " ")
}

// ago is a point in time with the time elapsed since.
func ago(t *timestamppb.Timestamp) string {
	if t == nil {
		return "<unknown>"
	}
	return fmt.Sprintf("%s (%s ago)", stamp(t), age(t))
}

func utcStamp(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Format(time.RFC3339Nano)
}
