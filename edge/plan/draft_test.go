package plan

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fleet is the configuration that the tests of drafts start from, with files.
type fleet struct {
	t       *testing.T
	ca      *authority
	content map[string]string
	last    *Plan
}

func newFleet(t *testing.T) *fleet {
	f := &fleet{t: t, ca: newAuthority(t), content: map[string]string{}}
	f.renew("cert")
	f.apply(f.resources()...)
	return f
}

// renew writes a new pair.
func (f *fleet) renew(name string) {
	chain, key, _ := f.ca.issue(leafOptions{names: []string{"app.test"}})
	f.content["/"+name+".crt"], f.content["/"+name+".key"] = chain, key
}

func (f *fleet) read(name string) ([]byte, error) {
	if data, ok := f.content[name]; ok {
		return []byte(data), nil
	}
	return nil, fs.ErrNotExist
}

func (f *fleet) resources(changed ...*resealv1.Resource) []*resealv1.Resource {
	return append([]*resealv1.Resource{
		pairOf("cert"), named("strict", &resealv1.TLSPolicy{}), named("web", listenerOn(":1")),
		named("app", pool("10.0.0.1:1")), named("other", pool("10.0.0.2:1")), routeTo("app"),
	}, changed...)
}

func pairOf(name string) *resealv1.Resource {
	return named(name, &resealv1.Certificate{CertificateFile: "/" + name + ".crt", PrivateKeyFile: "/" + name + ".key"})
}

func listenerOn(address string) *resealv1.Listener {
	return &resealv1.Listener{Address: address, Certificates: []string{"cert"}, TlsPolicy: "strict"}
}

func routeTo(pool string) *resealv1.Resource {
	return named("r", &resealv1.Route{Listeners: []string{"web"}, Pools: pools(pool)})
}

// apply compiles as much of resources as can be, as the edge does.
func (f *fleet) apply(resources ...*resealv1.Resource) *Draft {
	f.t.Helper()
	d := NewDraft(resealv1.NewSnapshot("c", 1, resources), nil, Env{ReadFile: f.read}, f.last)
	compiled := d.Compile()
	if compiled == nil {
		f.t.Fatalf("nothing can be served: %v", d.Violations())
	}
	f.last = compiled
	return d
}

func (f *fleet) target() string {
	f.t.Helper()
	for _, l := range f.last.Listeners {
		if l.Name == "web" {
			match, _ := l.Route("app.test", "/")
			return match.Pool
		}
	}
	return "no listener"
}

// certificate is what clients of the first listener get.
func (f *fleet) certificate() *tls.Certificate {
	f.t.Helper()
	chosen, err := f.last.Listeners[0].TLS.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		f.t.Fatal(err)
	}
	return chosen
}

func (f *fleet) leaf() string {
	return string(f.certificate().Certificate[0])
}

func held(d *Draft) string {
	var keys []string
	for _, ref := range d.HeldBack() {
		keys = append(keys, ref.Key())
	}
	return strings.Join(keys, " ")
}

func refusedFields(d *Draft) string {
	var fields []string
	for _, v := range d.Violations() {
		fields = append(fields, v.GetResource().Key()+": "+v.GetField())
	}
	return strings.Join(fields, ", ")
}

func brokenPool() *resealv1.BackendPool {
	p := pool("10.0.0.9:1")
	p.Tls = &resealv1.BackendTLS{Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaFile{CaFile: "/absent.pem"}}}
	return p
}

// A refused resource keeps its last good edition; what refers to it and changed too
// waits with it; the rest goes into force.
func TestRefusedResourceAlone(t *testing.T) {
	f := newFleet(t)
	d := f.apply(f.resources(named("app", brokenPool()), named("other", pool("10.0.0.3:1")))...)
	if refusedFields(d) != "BackendPool/app: spec.tls.trust.caFile" || held(d) != "BackendPool/app" {
		t.Errorf("refused %q, held back %q", refusedFields(d), held(d))
	}
	if at := f.last.Pools["app"].Spec.Endpoints[0].Address; at != "10.0.0.1:1" {
		t.Errorf("app is at %s", at)
	}
	if at := f.last.Pools["other"].Spec.Endpoints[0].Address; at != "10.0.0.3:1" {
		t.Errorf("a change beside a refused one is held back: other is at %s", at)
	}
	if f.target() != "app" {
		t.Errorf("requests go to %q", f.target())
	}
	// It is still held back when other things change, and comes when it is mended.
	d = f.apply(f.resources(named("app", brokenPool()), named("other", pool("10.0.0.4:1")))...)
	if held(d) != "BackendPool/app" || f.last.Pools["other"].Spec.Endpoints[0].Address != "10.0.0.4:1" {
		t.Errorf("held back %q", held(d))
	}
	f.content["/absent.pem"] = f.ca.pem
	if d = f.apply(f.resources(named("app", brokenPool()))...); held(d) != "" || f.last.Pools["app"].Spec.Endpoints[0].Address != "10.0.0.9:1" {
		t.Errorf("mended, and held back %q", held(d))
	}
}

func TestRefusedNewResource(t *testing.T) {
	f := newFleet(t)
	d := f.apply(f.resources(named("new", brokenPool()), routeTo("new"), named("extra", &resealv1.Listener{Address: ":2", Certificates: []string{"cert"}, Pool: "new"}))...)
	if held(d) != "BackendPool/new Listener/extra Route/r" || refusedFields(d) != "BackendPool/new: spec.tls.trust.caFile" {
		t.Errorf("held back %q, refused %q", held(d), refusedFields(d))
	}
	if f.target() != "app" || len(f.last.Listeners) != 1 {
		t.Errorf("requests go to %q, %d listeners", f.target(), len(f.last.Listeners))
	}
}

// A route that came with a stricter policy of its listener must not be served under
// the old one.
func TestNothingIsServedUnderAnOldPolicy(t *testing.T) {
	f := newFleet(t)
	strict := named("strict", &resealv1.TLSPolicy{ClientAuth: &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_REQUIRE, CaPem: "junk"}})
	admin := named("r2", &resealv1.Route{Listeners: []string{"web"}, Hosts: []string{"admin.test"}, Pools: pools("other")})
	web := listenerOn(":1")
	web.Pool = "other"
	d := f.apply(f.resources(strict, admin, named("web", web), named("other", pool("10.0.0.3:1")))...)
	if held(d) != "Listener/web Route/r2 TLSPolicy/strict" {
		t.Errorf("held back %q", held(d))
	}
	if match, ok := f.last.Listeners[0].Route("admin.test", "/"); !ok || match.Pool != "app" {
		t.Errorf("admin.test goes to %q without client certificates", match.Pool)
	}
}

// What a held-back resource needs stays, though the snapshot has it no longer.
func TestHeldBackKeepsWhatItNeeds(t *testing.T) {
	f := newFleet(t)
	d := f.apply(named("strict", &resealv1.TLSPolicy{}), pairOf("gone"), named("app", pool("10.0.0.1:1")), routeTo("app"),
		named("web", &resealv1.Listener{Address: ":1", Certificates: []string{"gone"}, TlsPolicy: "strict"}))
	if refusedFields(d) != "Certificate/gone: spec.certificateFile, Certificate/gone: spec.privateKeyFile" || held(d) != "Certificate/gone Listener/web" {
		t.Errorf("refused %q, held back %q", refusedFields(d), held(d))
	}
	if f.target() != "app" || f.last.Pools["other"] != nil {
		t.Error("the listener is gone with the certificate of its next edition, or a deleted pool stays")
	}
	f.renew("gone")
	if d = f.apply(pairOf("gone"), named("web", &resealv1.Listener{Address: ":1", Certificates: []string{"gone"}})); held(d) != "" || f.last.Snapshot().Len() != 2 {
		t.Errorf("held back %q, %d resources", held(d), f.last.Snapshot().Len())
	}
}

// Files are read again at each draft; what does not fit leaves the old content in
// force, even when the files are gone.
func TestFilesOfWhatIsInForce(t *testing.T) {
	f := newFleet(t)
	old := f.leaf()
	_, otherKey, _ := f.ca.issue(leafOptions{})
	key := f.content["/cert.key"]
	f.content["/cert.key"] = otherKey
	d := f.apply(f.resources()...)
	if f.leaf() != old || refusedFields(d) != "Certificate/cert: spec.privateKeyFile" || held(d) != "Certificate/cert" {
		t.Errorf("refused %q, held back %q", refusedFields(d), held(d))
	}
	delete(f.content, "/cert.key")
	if d = f.apply(f.resources()...); f.leaf() != old || len(d.Violations()) != 1 {
		t.Errorf("refused %q", refusedFields(d))
	}
	f.content["/cert.key"] = key
	if d = f.apply(f.resources()...); !d.Unchanged() && held(d) != "" {
		t.Errorf("held back %q", held(d))
	}
	// A renewed pair is taken, whatever else of the newest snapshot is refused, and
	// also when the newest edition of the certificate itself is.
	f.renew("cert")
	if f.apply(f.resources(named("app", brokenPool()))...); f.leaf() == old {
		t.Error("a renewed certificate isn't loaded while another resource is refused")
	}
	old = f.leaf()
	f.renew("cert")
	elsewhere := named("cert", &resealv1.Certificate{CertificateFile: "/nowhere.crt", PrivateKeyFile: "/nowhere.key"})
	if d = f.apply(f.resources(elsewhere)...); f.leaf() == old || held(d) != "Certificate/cert" {
		t.Errorf("a renewed certificate isn't loaded while its next edition is refused; held back %q", held(d))
	}
}

func TestSumsAreOfWhatWasCompiled(t *testing.T) {
	f := newFleet(t)
	var mu sync.Mutex
	d := NewDraft(resealv1.NewSnapshot("c", 1, f.resources()), nil, Env{ReadFile: func(name string) ([]byte, error) {
		mu.Lock()
		defer mu.Unlock()
		data, err := f.read(name)
		f.content[name] += "\n" // written right after the read
		return data, err
	}}, nil)
	d.Compile()
	for name, sum := range d.Files() {
		if SumOf(f.read(name)) == sum {
			t.Errorf("%s changed after it was read, and the sum is of the new content", name)
		}
	}
	if SumOf(nil, fs.ErrNotExist) == SumOf(nil, fs.ErrPermission) || SumOf(nil, nil) == SumOf(nil, fs.ErrNotExist) {
		t.Error("sums don't tell errors apart")
	}
}

// The edge's own refusals, of addresses in use, are held back in the same way.
func TestRefuseByTheCaller(t *testing.T) {
	f := newFleet(t)
	next := f.resources(named("web", listenerOn(":2")), named("late", listenerOn(":1")))
	d := NewDraft(resealv1.NewSnapshot("c", 2, next), nil, Env{ReadFile: f.read}, f.last)
	d.Compile()
	inUse := func(name string) []*resealv1.Violation {
		return []*resealv1.Violation{{Resource: &resealv1.ResourceRef{Kind: "Listener", Name: name}, Field: "spec.address", Description: "in use"}}
	}
	if !d.Refuse(inUse("web")) {
		t.Fatal("not refused")
	}
	// web is back at :1, so late, which sorts first, can't have it: it is new.
	compiled := d.Compile()
	if compiled == nil || len(compiled.Listeners) != 1 || compiled.Listeners[0].Name != "web" || compiled.Listeners[0].Spec.Address != ":1" {
		t.Fatalf("%v", d.Violations())
	}
	if held(d) != "Listener/late Listener/web" {
		t.Errorf("held back %q", held(d))
	}
	if d.Refuse(inUse("nobody")) {
		t.Error("something was held back for a listener that there isn't")
	}
}

func TestUnusableResource(t *testing.T) {
	f := newFleet(t)
	resources := slices.DeleteFunc(f.resources(named("other", pool("10.0.0.3:1"))), func(r *resealv1.Resource) bool { return r.GetMetadata().GetName() == "app" })
	unusable := []*resealv1.Violation{
		{Resource: &resealv1.ResourceRef{Kind: "BackendPool", Name: "app"}, Description: "not understood"},
		{Resource: &resealv1.ResourceRef{Kind: "Teapot", Name: "t"}, Description: "not known"},
	}
	d := NewDraft(resealv1.NewSnapshot("c", 2, resources), unusable, Env{ReadFile: f.read}, f.last)
	if f.last = d.Compile(); f.last == nil || f.target() != "app" || f.last.Pools["app"] == nil || held(d) != "BackendPool/app Teapot/t" || len(d.Violations()) != 2 {
		t.Errorf("held back %q: %v", held(d), d.Violations())
	}
	if f.last.Pools["other"].Spec.Endpoints[0].Address != "10.0.0.3:1" {
		t.Error("the rest isn't in force")
	}
}

// Editions that don't change are neither read nor parsed again, and a draft of the
// same is recognised.
func TestUnchangedDraft(t *testing.T) {
	f := newFleet(t)
	certificate := f.certificate()
	if d := f.apply(f.resources()...); !d.Unchanged() || f.certificate() != certificate {
		t.Error("the same snapshot is another plan")
	}
	if d := f.apply(f.resources(named("other", pool("10.0.0.3:1")))...); d.Unchanged() || f.certificate() != certificate {
		t.Error("a certificate is loaded again when a pool changes")
	}
}

// A panic in the compilation of one resource refuses that one.
func TestPanicRefusesOneResource(t *testing.T) {
	f := newFleet(t)
	f.content["/app.pem"] = f.ca.pem
	bad := brokenPool()
	bad.Tls.Trust.Roots = &resealv1.BackendTLS_Trust_CaFile{CaFile: "/app.pem"}
	d := NewDraft(resealv1.NewSnapshot("c", 2, f.resources(named("app", bad))), nil, Env{ReadFile: f.read}, f.last)
	d.chosen["BackendPool/app"].files = nil // a write to it panics
	if f.last = d.Compile(); f.last == nil || held(d) != "BackendPool/app" || f.last.Pools["app"].Spec.Endpoints[0].Address != "10.0.0.1:1" {
		t.Fatalf("%v", d.Violations())
	}
	if faults := d.Panics(); len(faults) != 1 || faults[0].Resource.Key() != "BackendPool/app" || len(faults[0].Stack) == 0 {
		t.Errorf("%v", faults)
	}
}

// Whatever is refused, what is served is sound for itself, and resources that are
// admitted without what is refused are served in their newest edition.
func TestDraftsOfRandomChanges(t *testing.T) {
	drawn := newDrawn(t)
	rapid.Check(t, func(t *rapid.T) {
		var last *Plan
		for round := range 2 {
			var resources []*resealv1.Resource
			for _, kind := range resealv1.Kinds {
				for _, name := range []string{"a", "b"} {
					resource := resealv1.NewResource(kind)
					resource.Metadata = &resealv1.Metadata{Name: name, Uid: "uid"}
					drawn.fill(t, resource.SpecMessage(), fmt.Sprint(round, kind, name))
					resources = append(resources, resource)
				}
			}
			absent := rapid.SampledFrom([]string{"", "/ca", "/key"}).Draw(t, "absent")
			read := func(name string) ([]byte, error) {
				if name == absent {
					return nil, errors.New("gone")
				}
				return drawn.read(name)
			}
			d := NewDraft(resealv1.NewSnapshot("c", int64(round), resources), nil, Env{ReadFile: read}, last)
			compiled := d.Compile()
			if compiled == nil {
				t.Fatalf("no part of it can be served: %v", d.Violations())
			}
			if len(d.Violations()) == 0 && len(d.HeldBack()) > 0 || len(d.Violations()) > 0 && len(d.HeldBack()) == 0 {
				t.Fatalf("held back %v by %v", d.HeldBack(), d.Violations())
			}
			_, again := Compile(compiled.Snapshot(), Env{ReadFile: drawn.read})
			if len(again) > 0 {
				t.Fatalf("what is served is not sound: %v", again)
			}
			last = compiled
		}
	})
}
