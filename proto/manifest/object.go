package manifest

import (
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"go.yaml.in/yaml/v3"
)

// Object is a resource with the place where it is written.
type Object struct {
	// Resource is what the document says, without defaults. Metadata that the
	// control plane assigns is left out.
	Resource *resealv1.Resource

	source source
	root   *yaml.Node // the document's or list item's mapping
}

// source tells where the nodes of a document stand.
type source struct {
	file string
	base int // lines in front of the part that was parsed
}

func (s source) at(n *yaml.Node) (file string, line, column int) {
	return s.file, s.base + n.Line, n.Column
}

// Position is where a field stands: the key of a named field or map entry, the
// item of a list. When the field itself is absent it is the nearest ancestor that
// is written, in the end the start of the document. Lines and columns count from
// 1. An Object that was not made by this package has no position: file is empty.
func (o Object) Position(path string) (file string, line, column int) {
	if o.root == nil {
		return "", 0, 0
	}
	node, _ := o.find(path)
	return o.source.at(node)
}

// find returns the node that stands for the path or its nearest ancestor, and
// whether it is the path's own.
func (o Object) find(path string) (place *yaml.Node, exact bool) {
	place, value := o.root, o.root
	for _, step := range splitPath(path) {
		var nextPlace, nextValue *yaml.Node
		switch {
		case step.index >= 0 && value.Kind == yaml.SequenceNode && step.index < len(value.Content):
			nextPlace = value.Content[step.index]
			nextValue = nextPlace
		case step.index < 0 && value.Kind == yaml.MappingNode:
			nextPlace, nextValue = entry(value, step.name)
		}
		if nextPlace == nil {
			return place, false
		}
		place, value = nextPlace, nextValue
	}
	return place, true
}

// entry finds a key of a mapping.
func entry(mapping *yaml.Node, name string) (key, value *yaml.Node) {
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		key := mapping.Content[i]
		if key.Kind == yaml.ScalarNode && (key.Value == name || rules.Shorten(key.Value) == name) {
			return key, mapping.Content[i+1]
		}
	}
	return nil, nil
}

// Locate turns violations into Errors with the positions of the objects that
// they are about. A violation of a resource that is not among the objects keeps
// its text and has no position. It returns nil when there are no violations.
func Locate(objects []Object, violations []*resealv1.Violation) error {
	byKey := make(map[string]Object, len(objects))
	for _, object := range objects {
		byKey[object.Resource.Ref().Key()] = object
	}
	var list errorList
	for _, violation := range violations {
		key := violation.GetResource().Key()
		e := Error{Resource: key, Path: violation.GetField(), Message: violation.GetDescription()}
		if object, ok := byKey[key]; ok {
			e.File, e.Line, e.Column = object.Position(e.Path)
		}
		list.add(e)
	}
	return list.err()
}
