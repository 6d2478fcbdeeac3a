package keyring

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
)

const (
	// digestFormat tells digests from what earlier versions wrote below the prefix.
	digestFormat = 2
	// parts is how many keys a replica's digest is divided into, by edge, so that an
	// edge that changes its mind all the time has little written. All fit into one
	// transaction of etcd.
	parts = 64
)

// head is what a replica tells of itself.
type head struct {
	Format int `json:"format"`
	// Name is Config.Name.
	Name string `json:"name"`
	// Cluster is the id of the etcd cluster that it was written to: not that of one
	// that was restored from a backup.
	Cluster uint64 `json:"cluster,string"`
	// Seen is a revision of etcd: an edge that is in no part of the digest is told
	// what was known then, or something newer.
	Seen int64 `json:"seen"`
	// Complete says that the replica knew all live edges of the fleet.
	Complete bool `json:"complete,omitempty"`
	// Ended says that the replica serves nobody any more. Its parts still tell who
	// was connected to it a moment ago.
	Ended bool `json:"ended,omitempty"`
}

func (h head) encode() ([]byte, error) { return json.Marshal(h) }

// part is one part of a replica's digest: its edges, those together that have
// acked the same.
type part struct {
	Groups []group `json:"groups"`
}

type group struct {
	Cover *cover `json:"cover"`
	// Edges are connected; Left were less than LiveFor ago. They are as stream.String
	// writes them, sorted.
	Edges []string `json:"edges,omitempty"`
	Left  []string `json:"left,omitempty"`
}

// stream is an edge's stream. A replica gives each of an edge's another number.
type stream struct {
	edge   string
	number uint64
}

// String is the edge's id, which holds no slash, and the number: "e1/7".
func (s stream) String() string { return s.edge + "/" + strconv.FormatUint(s.number, 36) }

func parseStream(text string) (stream, error) {
	i := strings.LastIndexByte(text, '/')
	if i <= 0 {
		return stream{}, fmt.Errorf("%w: %q is not a stream", errDamaged, cut(text))
	}
	number, err := strconv.ParseUint(text[i+1:], 36, 64)
	if err != nil {
		return stream{}, fmt.Errorf("%w: %q is not a stream", errDamaged, cut(text))
	}
	return stream{text[:i], number}, nil
}

// partOf is the part that an edge is in, the same on all replicas.
func partOf(edge string) int {
	sum := fnv.New32a()
	_, _ = sum.Write([]byte(edge))
	return int(sum.Sum32() % parts)
}

// told is what a replica tells of a stream.
type told struct {
	stream
	cover *cover
	left  bool
}

// makePart brings what is told into the form that is written, nil for nothing.
func makePart(all []told) []byte {
	if len(all) == 0 {
		return nil
	}
	groups := map[*cover]*group{}
	for _, t := range all {
		g := groups[t.cover]
		if g == nil {
			g = &group{Cover: t.cover}
			groups[t.cover] = g
		}
		if t.left {
			g.Left = append(g.Left, t.String())
		} else {
			g.Edges = append(g.Edges, t.String())
		}
	}
	var p part
	for _, g := range groups {
		slices.Sort(g.Edges)
		slices.Sort(g.Left)
		p.Groups = append(p.Groups, *g)
	}
	slices.SortFunc(p.Groups, func(a, b group) int { return cmp.Compare(a.first(), b.first()) })
	value, err := json.Marshal(p)
	if err != nil {
		panic(err) // there are only strings and numbers in it
	}
	return value
}

// first is the first stream of a group. No two groups have it in common.
func (g group) first() string {
	if len(g.Edges) > 0 {
		return g.Edges[0]
	}
	return g.Left[0]
}

// readPart is the reverse of makePart. Errors: errDamaged.
func readPart(data []byte) ([]told, error) {
	var p part
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	var all []told
	for _, g := range p.Groups {
		if g.Cover == nil {
			g.Cover = &cover{} // they live, but nothing is known of them
		}
		for i, text := range slices.Concat(g.Edges, g.Left) {
			s, err := parseStream(text)
			if err != nil {
				return nil, err
			}
			all = append(all, told{s, g.Cover, i >= len(g.Edges)})
		}
	}
	return all, nil
}

// readHead reads a replica's head. ok is false when it is something else, or of an
// earlier version.
func readHead(data []byte) (h head, ok bool) {
	err := json.Unmarshal(data, &h)
	return h, err == nil && h.Format == digestFormat
}
