package manifest

import (
	"fmt"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// decoder turns the nodes of one resource into messages. It goes on after an
// error, so that all of them are found.
type decoder struct {
	source source
	label  string // "Kind/name" for errors
	errs   errorList
}

// pair is one entry of a mapping.
type pair struct{ key, value *yaml.Node }

func (d *decoder) fail(n *yaml.Node, path, format string, args ...any) {
	file, line, column := d.source.at(n)
	d.errs.add(Error{
		File: file, Line: line, Column: column,
		Resource: d.label, Path: path, Message: fmt.Sprintf(format, args...),
	})
}

// unknown reports a name that does not exist, with the one that was probably
// meant.
func (d *decoder) unknown(key *yaml.Node, parent string, names []string) {
	hint := rules.DidYouMean(key.Value, names)
	if hint == "" {
		hint = "; known here: " + strings.Join(names, ", ")
	}
	d.fail(key, rules.FieldPath(parent, rules.Shorten(key.Value)), "unknown field%s", hint)
}

// entries lists a mapping's entries without duplicates.
func (d *decoder) entries(n *yaml.Node, path string) []pair {
	pairs := make([]pair, 0, len(n.Content)/2)
	first := make(map[string]*yaml.Node, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			d.fail(key, path, "a key must be a plain name")
			continue
		}
		if earlier, ok := first[key.Value]; ok {
			_, line, column := d.source.at(earlier)
			d.fail(key, rules.FieldPath(path, rules.Shorten(key.Value)), "is there twice, first at %d:%d; remove one", line, column)
			continue
		}
		first[key.Value] = key
		pairs = append(pairs, pair{key, value})
	}
	return pairs
}

// resource reads a whole document. It returns nil when not even the kind is
// known.
func (d *decoder) resource(root *yaml.Node) *resealv1.Resource {
	if root.Kind != yaml.MappingNode {
		d.fail(root, "", "a resource must be a mapping with apiVersion, kind, metadata and spec")
		return nil
	}
	d.label = label(root)
	pairs := d.entries(root, "")
	resource := d.envelope(root, pairs)
	if resource == nil {
		return nil
	}
	for _, e := range pairs {
		switch e.key.Value {
		case "apiVersion", "kind":
		case "metadata":
			d.mapping(e, resource.Metadata.ProtoReflect(), "metadata")
		case "spec":
			d.mapping(e, resource.SpecMessage(), "spec")
		default:
			d.unknown(e.key, "", []string{"apiVersion", "kind", "metadata", "spec"})
		}
	}
	inMetadata := func(e Error) bool { return isWithin(e.Path, "metadata") }
	if resource.Metadata.Name == "" && !slices.ContainsFunc(d.errs.kept, inMetadata) {
		node, _ := Object{root: root}.find("metadata.name")
		d.fail(node, "metadata.name", "is missing; name the resource")
	}
	return resource
}

// envelope checks apiVersion and kind.
func (d *decoder) envelope(root *yaml.Node, pairs []pair) *resealv1.Resource {
	find := func(name string) (pair, bool) {
		i := slices.IndexFunc(pairs, func(e pair) bool { return e.key.Value == name })
		if i < 0 {
			d.fail(root, name, "is missing")
			return pair{}, false
		}
		return pairs[i], true
	}
	if version, ok := find("apiVersion"); ok {
		d.apiVersion(version)
	}
	kind, ok := find("kind")
	if !ok {
		return nil
	}
	resource := resealv1.NewResource(kind.value.Value)
	if resource == nil {
		hint := rules.DidYouMean(kind.value.Value, resealv1.Kinds)
		if hint == "" {
			hint = "; it is one of " + rules.OneOf(resealv1.Kinds)
		}
		d.fail(kind.key, "kind", "unknown kind %s%s", rules.Quote(kind.value.Value), hint)
	}
	return resource
}

func (d *decoder) apiVersion(e pair) {
	if e.value.Value != APIVersion {
		d.fail(e.key, "apiVersion", "%s is not known; write %s", rules.Quote(e.value.Value), APIVersion)
	}
}

// mapping reads a value that must be a mapping, or empty, into m.
func (d *decoder) mapping(e pair, m protoreflect.Message, path string) {
	if isNull(e.value) {
		return
	}
	if e.value.Kind != yaml.MappingNode {
		d.fail(e.key, path, "must be a mapping with fields such as %s", m.Descriptor().Fields().Get(0).JSONName())
		return
	}
	d.message(e.value, m, path)
}

// message reads the fields of m.
func (d *decoder) message(n *yaml.Node, m protoreflect.Message, path string) {
	fields := m.Descriptor().Fields()
	for _, e := range d.entries(n, path) {
		field := fields.ByJSONName(e.key.Value)
		if field == nil {
			d.unknown(e.key, path, fieldNames(fields))
			continue
		}
		if isAssigned(field) || isNull(e.value) {
			continue
		}
		fieldPath := rules.FieldPath(path, e.key.Value)
		if oneof := field.ContainingOneof(); oneof != nil && m.WhichOneof(oneof) != nil {
			if !oneof.IsSynthetic() {
				d.fail(e.key, fieldPath, "only one of %s may be set", rules.OneOf(fieldNames(oneof.Fields())))
			}
			continue
		}
		d.field(e, m, field, fieldPath)
	}
}

func (d *decoder) field(e pair, m protoreflect.Message, field protoreflect.FieldDescriptor, path string) {
	switch {
	case field.IsMap():
		d.mapField(e, m.Mutable(field).Map(), field, path)
	case field.IsList():
		if e.value.Kind != yaml.SequenceNode {
			d.fail(e.key, path, "must be a list")
			return
		}
		list := m.Mutable(field).List()
		for i, item := range e.value.Content {
			if value, ok := d.value(item, item, list.NewElement, field, rules.ItemPath(path, i)); ok {
				list.Append(value)
			}
		}
	default:
		newValue := func() protoreflect.Value { return m.NewField(field) }
		if value, ok := d.value(e.key, e.value, newValue, field, path); ok {
			m.Set(field, value)
		}
	}
}

// mapField reads a map from strings to scalars.
func (d *decoder) mapField(e pair, entries protoreflect.Map, field protoreflect.FieldDescriptor, path string) {
	if e.value.Kind != yaml.MappingNode {
		d.fail(e.key, path, "must be a mapping")
		return
	}
	for _, e := range d.entries(e.value, path) {
		path := rules.EntryPath(path, e.key.Value)
		if !isText(e.key) {
			d.fail(e.key, path, "the key must be text; put it in quotes")
			continue
		}
		if value, ok := d.value(e.key, e.value, entries.NewValue, field.MapValue(), path); ok {
			entries.Set(protoreflect.ValueOfString(e.key.Value).MapKey(), value)
		}
	}
}

// value reads one message or scalar. Errors are reported at place.
func (d *decoder) value(place, n *yaml.Node, newValue func() protoreflect.Value, field protoreflect.FieldDescriptor, path string) (protoreflect.Value, bool) {
	if field.Message() != nil && !rules.IsDuration(field) {
		if n.Kind != yaml.MappingNode {
			d.fail(place, path, "must be a mapping with fields such as %s", field.Message().Fields().Get(0).JSONName())
			return protoreflect.Value{}, false
		}
		value := newValue()
		d.message(n, value.Message(), path)
		return value, true
	}
	value, err := scalar(n, field)
	if err != nil {
		d.fail(place, path, "%s", err)
		return protoreflect.Value{}, false
	}
	return value, true
}

func fieldNames(fields protoreflect.FieldDescriptors) []string {
	names := make([]string, fields.Len())
	for i := range names {
		names[i] = fields.Get(i).JSONName()
	}
	return names
}

// isAssigned says whether the control plane assigns a field. Of Metadata these
// are the fields from uid on.
func isAssigned(field protoreflect.FieldDescriptor) bool {
	const uid = 4
	return field.Parent().FullName() == "reseal.v1.Metadata" && field.Number() >= uid
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Tag == "!!null"
}

// isText says whether a scalar is a string. YAML 1.1's timestamps are strings
// here, as in YAML 1.2.
func isText(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && (n.Tag == "!!str" || n.Tag == "!!timestamp")
}
