package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"go.yaml.in/yaml/v3"
)

const (
	// maxFileBytes bounds one file, or stdin.
	maxFileBytes = 16 << 20
	// maxDepth bounds how deep mappings and lists may nest. The deepest field
	// of the protocol is at 7.
	maxDepth = 32
)

// Parse reads all documents of a YAML or JSON file and checks each resource with
// Validate. The name is only used for positions. A document may be a resource or
// a list (kind List with items). Empty documents are skipped.
//
// The error is Errors and holds everything that is wrong in all documents; the
// objects are then those without an error. At most 16 MiB are read.
func Parse(name string, data []byte) ([]Object, error) {
	return parse(name, data, true)
}

func parse(name string, data []byte, validate bool) ([]Object, error) {
	p := newParser(validate)
	p.parseFile(name, data)
	return p.objects, p.errs.err()
}

// parser reads files one after the other.
type parser struct {
	validate bool
	source   source
	errs     errorList
	objects  []Object
	seen     map[string]string // Kind/name to the place where it is written
}

func newParser(validate bool) *parser {
	return &parser{validate: validate, seen: make(map[string]string)}
}

func (p *parser) parseFile(name string, data []byte) {
	p.source = source{file: name}
	if len(data) > maxFileBytes {
		p.errs.add(Error{File: name, Message: fmt.Sprintf("is larger than %d MiB; split it", maxFileBytes>>20)})
		return
	}
	if json.Valid(data) {
		data = yamlEscapes(data)
	}
	start := len(p.errs.kept)
	for len(data) > 0 {
		part := firstPart(data)
		if err := p.parsePart(part); err != nil {
			p.errs.add(p.syntaxError(err))
		}
		p.source.base += bytes.Count(part, []byte("\n"))
		data = data[len(part):]
	}
	p.errs.sortFrom(start)
}

// firstPart cuts data in front of the second document, so that a syntax error in
// one document does not hide the errors of the next. A line that starts with
// "---" and a blank always separates documents (YAML 1.2 section 9.1.2).
// Comments and directives stay with the document that follows them.
func firstPart(data []byte) []byte {
	content := false
	for at := 0; at < len(data); {
		line := data[at:]
		if end := bytes.IndexByte(line, '\n'); end >= 0 {
			line = line[:end+1]
		}
		separator := bytes.HasPrefix(line, []byte("---")) && (len(line) == 3 || strings.IndexByte(" \t\r\n", line[3]) >= 0)
		if separator && content {
			return data[:at]
		}
		trimmed := bytes.TrimSpace(line)
		if separator || len(trimmed) > 0 && trimmed[0] != '#' && line[0] != '%' {
			content = true
		}
		at += len(line)
	}
	return data
}

// parsePart reads the documents of one part.
func (p *parser) parsePart(part []byte) error {
	decoder := yaml.NewDecoder(bytes.NewReader(part))
	for {
		root, err := nextDocument(decoder)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !isNull(root) {
			p.document(root)
		}
	}
}

// nextDocument returns the content of the next document, io.EOF after the last.
func nextDocument(decoder *yaml.Decoder) (root *yaml.Node, err error) {
	// The YAML parser reports inconsistencies of its own by panic. A file that
	// causes one is refused like any other that can't be read.
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("can't be read: %v", reason)
		}
	}()
	var document yaml.Node
	if err := decoder.Decode(&document); err != nil {
		return nil, err
	}
	return document.Content[0], nil
}

// syntaxError takes the line out of an error of the YAML parser, which gives no
// column.
func (p *parser) syntaxError(err error) Error {
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if found := regexp.MustCompile(`^line (\d+): `).FindStringSubmatch(message); found != nil {
		message = message[len(found[0]):]
		line, _ = strconv.Atoi(found[1])
	}
	return Error{File: p.source.file, Line: p.source.base + line, Message: "not valid YAML: " + rules.Shorten(message)}
}

// document reads a resource or a list of them.
func (p *parser) document(root *yaml.Node) {
	if err := p.checkStructure(root); err != nil {
		p.errs.add(*err)
		return
	}
	if _, kind := entry(root, "kind"); root.Kind == yaml.MappingNode && kind != nil && kind.Value == listKind {
		p.list(root)
		return
	}
	p.object(root)
}

// checkStructure refuses what no manifest needs and what makes a document larger
// or deeper than it looks.
func (p *parser) checkStructure(root *yaml.Node) *Error {
	fail := func(n *yaml.Node, message string) *Error {
		file, line, column := p.source.at(n)
		return &Error{File: file, Line: line, Column: column, Message: message}
	}
	var check func(n *yaml.Node, depth int) *Error
	check = func(n *yaml.Node, depth int) *Error {
		switch {
		case n.Kind == yaml.AliasNode || n.Anchor != "":
			return fail(n, "anchors and aliases are not supported; write the value out")
		case n.Style&yaml.TaggedStyle != 0 && !strings.HasPrefix(n.Tag, "!!"):
			return fail(n, "tags are not supported; write the plain value")
		case depth > maxDepth:
			return fail(n, fmt.Sprintf("nested deeper than %d levels", maxDepth))
		}
		for _, child := range n.Content {
			if err := check(child, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	return check(root, 0)
}

// list reads the items of a document of kind List.
func (p *parser) list(root *yaml.Node) {
	d := &decoder{source: p.source, label: listKind}
	if key, _ := entry(root, "apiVersion"); key == nil {
		d.fail(root, "apiVersion", "is missing")
	}
	for _, e := range d.entries(root, "") {
		switch e.key.Value {
		case "apiVersion":
			d.apiVersion(e)
		case "kind", "metadata":
		case "items":
			if e.value.Kind != yaml.SequenceNode && !isNull(e.value) {
				d.fail(e.key, "items", "is not a list")
				break
			}
			for _, item := range e.value.Content {
				p.object(item)
			}
		default:
			d.unknown(e.key, "", []string{"apiVersion", "kind", "metadata", "items"})
		}
	}
	p.take(&d.errs)
}

// object reads one resource.
func (p *parser) object(root *yaml.Node) {
	d := &decoder{source: p.source}
	resource := d.resource(root)
	if resource != nil {
		object := Object{Resource: resource, source: p.source, root: root}
		if p.validate {
			d.check(object)
		}
		d.duplicate(object, p.seen)
		if len(d.errs.kept) == 0 {
			p.objects = append(p.objects, object)
		}
	}
	p.take(&d.errs)
}

func (p *parser) take(errs *errorList) {
	for _, e := range errs.kept {
		p.errs.add(e)
	}
	p.errs.dropped += errs.dropped
}

// duplicate reports a resource that was written before.
func (d *decoder) duplicate(object Object, seen map[string]string) {
	if object.Resource.GetMetadata().GetName() == "" {
		return
	}
	key := object.Resource.Ref().Key()
	file, line, column := object.Position("")
	if first, ok := seen[key]; ok {
		d.fail(object.root, "", "is there twice, first at %s; remove one", first)
		return
	}
	seen[key] = fmt.Sprintf("%s:%d:%d", file, line, column)
}

// check adds violations. Where a document could not be read in full it leaves
// out those that may only follow from that: on fields that are absent, or that
// have an error already.
func (d *decoder) check(object Object) {
	unread := d.errs.kept
	for _, violation := range Validate(object.Resource) {
		node, exact := object.find(violation.GetField())
		follows := len(unread) > 0 && !exact
		for _, e := range unread {
			follows = follows || isWithin(e.Path, violation.GetField()) || isWithin(violation.GetField(), e.Path)
		}
		if !follows {
			d.fail(node, violation.GetField(), "%s", violation.GetDescription())
		}
	}
}

// label is what errors of a document call its resource.
func label(root *yaml.Node) string {
	kind, name := scalarAt(root, "kind"), ""
	if _, metadata := entry(root, "metadata"); metadata != nil && metadata.Kind == yaml.MappingNode {
		name = scalarAt(metadata, "name")
	}
	if kind == "" || name == "" {
		return rules.Shorten(kind)
	}
	return (&resealv1.ResourceRef{Kind: rules.Shorten(kind), Name: rules.Shorten(name)}).Key()
}

func scalarAt(mapping *yaml.Node, name string) string {
	if _, value := entry(mapping, name); value != nil && value.Kind == yaml.ScalarNode && !isNull(value) {
		return value.Value
	}
	return ""
}
