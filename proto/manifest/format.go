package manifest

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"maps"
	"slices"
)

// Format writes resources so that Parse reads them back equal. Fields stand in
// the order of the protocol, map entries sorted by key. The zero value writes
// everything as it is, secrets included: give it resources that were redacted.
type Format struct {
	// OmitAssigned leaves out the metadata that the control plane assigns.
	OmitAssigned bool
	// OmitRedacted leaves out write-only fields that hold the redaction marker,
	// so that the result can be applied again: an absent secret keeps the
	// stored one.
	OmitRedacted bool
}

// FormatYAML writes resources as YAML documents, with the zero Format.
func FormatYAML(w io.Writer, resources ...*resealv1.Resource) error {
	return Format{}.YAML(w, resources...)
}

// FormatJSON writes resources as JSON, with the zero Format.
func FormatJSON(w io.Writer, resources ...*resealv1.Resource) error {
	return Format{}.JSON(w, resources...)
}

// YAML writes one document per resource, separated by "---". Without resources
// it writes nothing. A resource without a spec is an error.
func (f Format) YAML(w io.Writer, resources ...*resealv1.Resource) error {
	if len(resources) == 0 {
		return nil
	}
	encoder := yaml.NewEncoder(w)
	encoder.SetIndent(2)
	for _, resource := range resources {
		node, err := f.node(resource)
		if err != nil {
			return err
		}
		if err := encoder.Encode(node); err != nil {
			return fmt.Errorf("write %s: %w", resource.Ref().Key(), err)
		}
	}
	return encoder.Close()
}

// JSON writes one resource as an object, none or several as an object of kind
// List with items. A resource without a spec is an error.
func (f Format) JSON(w io.Writer, resources ...*resealv1.Resource) error {
	items := &yaml.Node{Kind: yaml.SequenceNode}
	for _, resource := range resources {
		node, err := f.node(resource)
		if err != nil {
			return err
		}
		items.Content = append(items.Content, node)
	}
	var root *yaml.Node
	if len(resources) == 1 {
		root = items.Content[0]
	} else {
		root = mappingNode(textNode("apiVersion"), textNode(APIVersion),
			textNode("kind"), textNode(listKind), textNode("items"), items)
	}
	var buffer bytes.Buffer
	writeJSON(&buffer, root, "")
	buffer.WriteByte('\n')
	_, err := w.Write(buffer.Bytes())
	return err
}

// node is the tree that both forms are written from.
func (f Format) node(r *resealv1.Resource) (*yaml.Node, error) {
	if r.Kind() == "" {
		return nil, fmt.Errorf("resource %q has no spec", r.GetMetadata().GetName())
	}
	return mappingNode(
		textNode("apiVersion"), textNode(APIVersion),
		textNode("kind"), textNode(r.Kind()),
		textNode("metadata"), f.message(r.GetMetadata().ProtoReflect()),
		textNode("spec"), f.message(r.SpecMessage()),
	), nil
}

func (f Format) message(m protoreflect.Message) *yaml.Node {
	node := mappingNode()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if !m.Has(field) || f.OmitAssigned && isAssigned(field) {
			continue
		}
		value := m.Get(field)
		if f.OmitRedacted && rules.IsSecret(field) && value.String() == resealv1.SecretMarker {
			continue
		}
		node.Content = append(node.Content, textNode(field.JSONName()), f.field(field, value))
	}
	return node
}

func (f Format) field(field protoreflect.FieldDescriptor, value protoreflect.Value) *yaml.Node {
	switch {
	case field.IsMap():
		node := mappingNode()
		entries := make(map[string]*yaml.Node, value.Map().Len())
		for key, value := range value.Map().Range {
			entries[key.String()] = f.value(field.MapValue(), value)
		}
		for _, key := range slices.Sorted(maps.Keys(entries)) {
			node.Content = append(node.Content, textNode(key), entries[key])
		}
		return node
	case field.IsList():
		node := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range value.List().Len() {
			node.Content = append(node.Content, f.value(field, value.List().Get(i)))
		}
		return node
	default:
		return f.value(field, value)
	}
}

func (f Format) value(field protoreflect.FieldDescriptor, value protoreflect.Value) *yaml.Node {
	switch field.Kind() {
	case protoreflect.MessageKind:
		switch m := value.Message().Interface().(type) {
		case *durationpb.Duration:
			return textNode(rules.DurationText(m.AsDuration()))
		case *timestamppb.Timestamp:
			return textNode(m.AsTime().Format(time.RFC3339))
		}
		return f.message(value.Message())
	case protoreflect.EnumKind:
		return enumNode(field.Enum(), value.Enum())
	case protoreflect.BoolKind:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: value.String()}
	case protoreflect.StringKind:
		return textNode(value.String())
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: value.String()}
	}
}

func enumNode(enum protoreflect.EnumDescriptor, number protoreflect.EnumNumber) *yaml.Node {
	value := enum.Values().ByNumber(number)
	if value == nil {
		return textNode(fmt.Sprintf("unknown_%d", number))
	}
	return textNode(resealv1.ValueLabel(value))
}

func mappingNode(content ...*yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.MappingNode, Content: content}
}

// textNode is a string in the plainest style that every YAML reader takes for
// the same string.
func textNode(text string) *yaml.Node {
	text = strings.ToValidUTF8(text, "\uFFFD")
	node := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: text}
	switch {
	case isBlock(text):
		node.Style = yaml.LiteralStyle
	case isAmbiguous(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }):
		node.Style = yaml.DoubleQuotedStyle
	}
	return node
}

// isBlock says whether a text of several lines, such as PEM, can stand as a
// literal block without any change.
func isBlock(text string) bool {
	if !strings.Contains(text, "\n") || strings.TrimLeft(text, " \n") != text {
		return false
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasSuffix(line, " ") || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return false
		}
	}
	return true
}

// isAmbiguous says whether readers of YAML 1.1 take a plain text for a bool or a
// number to the base of 60.
func isAmbiguous(text string) bool {
	switch strings.ToLower(text) {
	case "y", "n", "yes", "no", "on", "off":
		return true
	}
	return strings.Contains(text, ":") && strings.Trim(text, "0123456789:_+-") == ""
}
