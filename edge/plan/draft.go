package plan

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
)

const (
	// maxRounds bounds the attempts to find a part of a snapshot that can be
	// served. Each takes back all that the one before found to be wrong, so a few
	// are enough.
	maxRounds = 24
	// readsAtOnce bounds the files that are read at a time.
	readsAtOnce = 16
)

// Draft finds what of a snapshot this edge can serve. What it can't is held back:
// the resource keeps the edition that is in force, or stays away if there is none,
// and so do the resources that refer to it, as far as they changed, since they may
// rely on what did not come (a route on a listener whose TLS policy now asks for
// client certificates). Everything else goes into force.
//
// A Draft is for one goroutine.
type Draft struct {
	env      Env
	last     map[string]*edition // in force
	wanted   map[string]*edition // of the snapshot; nil for one that can't be used
	cluster  string
	revision int64

	chosen     map[string]*edition
	gone       map[string]bool       // not even the edition in force is left
	ladders    map[string][]*edition // made when needed
	users      map[string][]string   // likewise
	violations []*resealv1.Violation

	files  map[string]file
	panics []Panic
}

// Panic is a fault of this program that a resource brought to light.
type Panic struct {
	// Resource that was being compiled.
	Resource *resealv1.ResourceRef
	// Reason is what was panicked with.
	Reason any
	// Stack of the goroutine.
	Stack []byte
}

// edition is a resource with the files that it was compiled from. Editions that are
// in force are kept with the plan, so that what did not change is not read again.
type edition struct {
	resource *resealv1.Resource
	files    map[string][]byte

	checked     bool
	problems    []*resealv1.Violation
	certificate *certificate // nil: not loaded, or broken
	roots       *roots       // likewise
}

// rules are the violations of the resource for itself.
func (e *edition) rules() []*resealv1.Violation {
	if !e.checked {
		e.checked, e.problems = true, rules.Resource(e.resource)
	}
	return e.problems
}

// file is what reading a file gave.
type file struct {
	data []byte
	err  error
}

var errNoFiles = errors.New("this edge reads no files")

// NewDraft begins with all of s. unusable are violations of resources that could
// not be understood and that s lacks for that reason. last is the plan in force,
// or nil.
func NewDraft(s *resealv1.Snapshot, unusable []*resealv1.Violation, env Env, last *Plan) *Draft {
	d := &Draft{
		env: env, cluster: s.ClusterID(), revision: s.Revision(),
		wanted: map[string]*edition{}, chosen: map[string]*edition{}, gone: map[string]bool{}, ladders: map[string][]*edition{},
		files: map[string]file{}, violations: slices.Clone(unusable),
	}
	if last != nil {
		d.last = last.editions
	}
	d.readAll(s)
	for _, resource := range s.All() {
		key := resource.Ref().Key()
		d.wanted[key] = d.edition(key, resource)
		d.chosen[key] = d.wanted[key]
	}
	for _, violation := range unusable {
		d.wanted[violation.GetResource().Key()] = nil
	}
	for _, violation := range unusable {
		key := violation.GetResource().Key()
		if rungs := d.ladder(key); len(rungs) > 0 {
			d.chosen[key] = rungs[0]
			d.restore(key)
		}
		d.holdUsers(key)
	}
	return d
}

// edition is the one in force, when neither the resource nor its files changed.
func (d *Draft) edition(key string, resource *resealv1.Resource) *edition {
	kept := d.last[key]
	if kept == nil || kept.resource != resource && !proto.Equal(kept.resource, resource) {
		return &edition{resource: resource, files: map[string][]byte{}}
	}
	for name, data := range kept.files {
		if fresh := d.read(name); fresh.err != nil || !bytes.Equal(fresh.data, data) {
			return &edition{resource: resource, files: map[string][]byte{}}
		}
	}
	return kept
}

// readAll reads all files that the resources of s name.
func (d *Draft) readAll(s *resealv1.Snapshot) {
	names := map[string]bool{}
	for _, resource := range s.All() {
		for _, name := range fileNames(resource) {
			names[name] = true
		}
	}
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(readsAtOnce)
	for name := range names {
		group.Go(func() error {
			content := d.readNow(name)
			mu.Lock()
			defer mu.Unlock()
			d.files[name] = content
			return nil
		})
	}
	_ = group.Wait() // no function fails
}

func fileNames(resource *resealv1.Resource) []string {
	var names []string
	for _, name := range []string{
		resource.GetBackendPool().GetTls().GetTrust().GetCaFile(),
		resource.GetCertificate().GetCertificateFile(), resource.GetCertificate().GetPrivateKeyFile(),
	} {
		if name != "" {
			names = append(names, name)
		}
	}
	return names
}

// read reads each file once, so that all users see the same content.
func (d *Draft) read(name string) file {
	content, ok := d.files[name]
	if !ok {
		content = d.readNow(name)
		d.files[name] = content
	}
	return content
}

func (d *Draft) readNow(name string) file {
	if d.env.ReadFile == nil {
		return file{err: errNoFiles}
	}
	var data []byte
	err := exchange.Guard("a file was read", func() (err error) {
		data, err = d.env.ReadFile(name)
		return err
	})
	return file{data: data, err: err}
}

// content is what an edition reads: the same bytes for as long as it is in force.
func (d *Draft) content(e *edition, name string) ([]byte, error) {
	if data, ok := e.files[name]; ok {
		return data, nil
	}
	fresh := d.read(name)
	if fresh.err == nil {
		e.files[name] = fresh.data
	}
	return fresh.data, fresh.err
}

// Sum is a hash of a file's content, or of the reason why it could not be read.
type Sum [sha256.Size]byte

// SumOf is the Sum of what a ReadFile returned.
func SumOf(data []byte, err error) Sum {
	if err != nil {
		return sha256.Sum256([]byte("\x00" + fileProblem(err)))
	}
	return sha256.Sum256(data)
}

// Files are all files that were read, with what was read of them. When one
// changes, the snapshot must be drafted again: what is wrong may be mended.
func (d *Draft) Files() map[string]Sum {
	sums := make(map[string]Sum, len(d.files))
	for name, content := range d.files {
		sums[name] = SumOf(content.data, content.err)
	}
	return sums
}

// fileProblem says why a file can't be used, without repeating its name.
func fileProblem(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "does not exist on this edge"
	case errors.Is(err, fs.ErrPermission):
		return "may not be read by this edge"
	}
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	return "can't be read: " + err.Error()
}

// Compile makes a plan of as much of the snapshot as this edge can serve. It
// returns nil when it finds no such part; what is in force should then stay.
func (d *Draft) Compile() *Plan {
	for range maxRounds {
		compiled, violations := d.compile()
		if len(violations) == 0 {
			return compiled
		}
		if !d.Refuse(violations) {
			return nil
		}
	}
	return nil
}

func (d *Draft) compile() (*Plan, []*resealv1.Violation) {
	c := &compiler{
		draft: d, editions: maps.Clone(d.chosen), broken: map[string]bool{},
		policies: map[string]*policy{}, certificates: map[string]*certificate{},
	}
	resources := make([]*resealv1.Resource, 0, len(d.chosen))
	for _, e := range d.chosen {
		resources = append(resources, e.resource)
	}
	c.snapshot = resealv1.NewSnapshot(d.cluster, d.revision, resources)
	return c.compile(), c.violations
}

func (d *Draft) panicked(ref *resealv1.ResourceRef, reason any, stack []byte) {
	d.panics = append(d.panics, Panic{Resource: ref, Reason: reason, Stack: stack})
}

// Panics are the faults that compilations met so far.
func (d *Draft) Panics() []Panic { return d.panics }

// Violations say what of the snapshot is refused, in the order in which it was
// found.
func (d *Draft) Violations() []*resealv1.Violation { return d.violations }

// HeldBack are the resources of the snapshot that the next plan has in an older
// edition or not at all, sorted: those that are refused and those that go with
// them.
func (d *Draft) HeldBack() []*resealv1.ResourceRef {
	var held []*resealv1.ResourceRef
	for _, key := range slices.Sorted(maps.Keys(d.wanted)) {
		if want := d.wanted[key]; want == nil || d.chosen[key] != want {
			held = append(held, refOf(key))
		}
	}
	return held
}

// Unchanged reports whether the next plan is the one in force.
func (d *Draft) Unchanged() bool { return d.last != nil && maps.Equal(d.chosen, d.last) }
