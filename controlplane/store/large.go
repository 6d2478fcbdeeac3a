package store

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// largeRemoval is how many resources a change may remove whatever share of all
	// they are, so that small configurations come and go as before.
	largeRemoval = 10
	// namedRemovals bounds the names in the sentence about a kind.
	namedRemovals = 3
)

// errAskEdges means that it takes the labels of the edges to judge a change.
var errAskEdges = errors.New("the edges have to be asked")

// large says why a change is large: an empty selector or manifest must not mean by
// accident that all of it goes away. The error is ErrLargeChange when m does not
// allow it, or errAskEdges.
func (s *Store) large(before *resealv1.Snapshot, m mutation, changes []change) ([]string, error) {
	reasons := largeRemovals(before, changes)
	if selectors := movedSelectors(changes); len(selectors) > 0 {
		if m.edges == nil {
			return nil, errAskEdges
		}
		reasons = append(reasons, emptiedSelectors(selectors, *m.edges)...)
	}
	if len(reasons) > 0 && !m.allowLarge && !m.dryRun {
		return nil, fmt.Errorf("%w, and nothing was changed: %s: if that is meant, say so with --allow-large-change",
			ErrLargeChange, strings.Join(reasons, "; "))
	}
	return reasons, nil
}

// largeRemovals looks at the resources that changes remove.
func largeRemovals(before *resealv1.Snapshot, changes []change) []string {
	removed, count := map[string][]string{}, 0
	for _, c := range changes {
		if c.after == nil {
			removed[c.ref.GetKind()] = append(removed[c.ref.GetKind()], c.ref.GetName())
			count++
		}
	}
	var parts, emptied []string
	for _, kind := range resealv1.Kinds {
		names := removed[kind]
		if len(names) == 0 {
			continue
		}
		all := len(before.Kind(kind))
		part := fmt.Sprintf("%d of %d %s (%s)", len(names), all, plural(kind), someOf(names))
		parts = append(parts, part)
		if len(names) == all && all > largeRemoval {
			emptied = append(emptied, "it removes "+part)
		}
	}
	if count > largeRemoval && 2*count > before.Len() {
		return []string{fmt.Sprintf("it removes %d of all %d resources: %s", count, before.Len(), strings.Join(parts, ", "))}
	}
	return emptied
}

func plural(kind string) string {
	if stem, ok := strings.CutSuffix(kind, "y"); ok {
		return stem + "ies"
	}
	return kind + "s"
}

// someOf is "a, b, c and 7 more".
func someOf(names []string) string {
	slices.Sort(names)
	if len(names) <= namedRemovals {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:namedRemovals], ", "), len(names)-namedRemovals)
}

// movedSelectors are the changes of resources that stay, but for other edges.
func movedSelectors(changes []change) []change {
	var moved []change
	for _, c := range changes {
		if c.before != nil && c.after != nil && !proto.Equal(selector(c.before), selector(c.after)) {
			moved = append(moved, c)
		}
	}
	return moved
}

func selector(r *resealv1.Resource) *resealv1.EdgeSelector {
	if keyring := r.GetKeyring(); keyring != nil {
		return keyring.GetEdgeSelector()
	}
	return r.GetListener().GetEdgeSelector()
}

// emptiedSelectors looks for resources that edges have and then none would have.
func emptiedSelectors(moved []change, edges []map[string]string) []string {
	var reasons []string
	for _, c := range moved {
		had, has := 0, 0
		for _, labels := range edges {
			if selector(c.before).Selects(labels) {
				had++
			}
			if selector(c.after).Selects(labels) {
				has++
			}
		}
		if had > 0 && has == 0 {
			reasons = append(reasons, fmt.Sprintf("the edgeSelector of %s %q selects none of the live edges, and selected %d before",
				c.ref.GetKind(), c.ref.GetName(), had))
		}
	}
	return reasons
}
