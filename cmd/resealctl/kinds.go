package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	kindAll   = "all"
	kindEdges = "Edge"
)

// selection is what an argument list names: kinds, and the names within each.
type selection struct {
	kinds []string            // as in manifests, "all" or "Edge"
	names map[string][]string // by kind; none means all
}

// parseSelection reads "KIND[,KIND...] [NAME...]" or "KIND/NAME...".
func parseSelection(args []string) (*selection, error) {
	if len(args) == 0 {
		return nil, usagef("name a kind: %s", kindList())
	}
	s := &selection{names: make(map[string][]string)}
	if strings.Contains(args[0], "/") {
		for _, arg := range args {
			kind, name, found := strings.Cut(arg, "/")
			if !found || name == "" {
				return nil, usagef("%q is not KIND/NAME", arg)
			}
			if err := s.add(kind, name); err != nil {
				return nil, err
			}
		}
		return s, nil
	}
	names := args[1:]
	for word := range strings.SplitSeq(args[0], ",") {
		if err := s.add(word, names...); err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		if strings.Contains(name, "/") {
			return nil, usagef("%q: either KIND NAME... or KIND/NAME..., not both", name)
		}
	}
	return s, nil
}

func (s *selection) add(word string, names ...string) error {
	kind, err := kindByName(word)
	if err != nil {
		return err
	}
	if kind == kindAll && len(names) > 0 {
		return usagef("a name needs one kind, not all")
	}
	if !slices.Contains(s.kinds, kind) {
		s.kinds = append(s.kinds, kind)
	}
	s.names[kind] = append(s.names[kind], names...)
	return nil
}

// wants says whether the selection includes a resource or edge.
func (s *selection) wants(kind, name string) bool {
	names, chosen := s.names[kind]
	if !chosen {
		names, chosen = s.names[kindAll]
	}
	return chosen && (len(names) == 0 || slices.Contains(names, name))
}

// named says whether single things were asked for.
func (s *selection) named() bool {
	for _, names := range s.names {
		if len(names) > 0 {
			return true
		}
	}
	return false
}

// kindByName finds the kind that a word stands for, as people type it.
func kindByName(word string) (string, error) {
	switch strings.ToLower(word) {
	case kindAll:
		return kindAll, nil
	case "edge", "edges":
		return kindEdges, nil
	}
	if kind, ok := manifest.KindByName(word); ok {
		return kind, nil
	}
	return "", usagef("there is no kind %q; kinds: %s", word, kindList())
}

// kindWords are the words for kinds in commands, in the plural.
func kindWords() []string {
	words := make([]string, 0, len(resealv1.Kinds)+1)
	for _, kind := range resealv1.Kinds {
		words = append(words, pluralOf(kind))
	}
	return append(words, "edges")
}

func kindList() string { return strings.Join(append(kindWords(), kindAll), ", ") }

func pluralOf(kind string) string {
	word := strings.ToLower(kind)
	if strings.HasSuffix(word, "y") {
		return strings.TrimSuffix(word, "y") + "ies"
	}
	return word + "s"
}

// refName is "kind/name" as commands print and take it.
func refName(ref *resealv1.ResourceRef) string {
	return strings.ToLower(ref.GetKind()) + "/" + ref.GetName()
}

// parseLabels reads "k=v,k2=v2".
func parseLabels(text string) (map[string]string, error) {
	labels := make(map[string]string)
	if text == "" {
		return labels, nil
	}
	for pair := range strings.SplitSeq(text, ",") {
		key, value, found := strings.Cut(pair, "=")
		value = strings.TrimPrefix(value, "=")
		if !found || key == "" || strings.HasSuffix(key, "!") {
			return nil, usagef("label %q is not KEY=VALUE", pair)
		}
		if old, twice := labels[key]; twice && old != value {
			return nil, usagef("label %q is there twice", key)
		}
		labels[key] = value
	}
	return labels, nil
}

// hasLabels says whether labels include all of want.
func hasLabels(labels, want map[string]string) bool {
	for key, value := range maps.All(want) {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// resourceNotFound is the error of a resource that does not exist.
func resourceNotFound(ref *resealv1.ResourceRef) error {
	return notFound(strings.ToLower(ref.GetKind()), ref.GetName())
}

// describeMissing names the resource when the control plane's NOT_FOUND can only
// mean one.
func describeMissing(err error, refs ...*resealv1.ResourceRef) error {
	switch {
	case !errors.Is(err, errNotFound):
		return err
	case len(refs) == 1:
		return resourceNotFound(refs[0])
	}
	return fmt.Errorf("%w; nothing was changed", err)
}
