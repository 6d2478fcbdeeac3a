package manifest

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// snapshotViolations checks the resources of a manifest as a whole configuration.
func snapshotViolations(t *testing.T, text string) []string {
	t.Helper()
	objects, err := parse("f", []byte(text), false)
	if err != nil {
		t.Fatal(err)
	}
	var resources []*resealv1.Resource
	for _, object := range objects {
		resources = append(resources, object.Resource)
	}
	var lines []string
	for _, violation := range ValidateSnapshot(resealv1.NewSnapshot("c", 1, resources)) {
		lines = append(lines, violation.Text())
	}
	return lines
}

const (
	isPool     = "---\napiVersion: reseal/v1\nkind: BackendPool\n"
	isPolicy   = "---\napiVersion: reseal/v1\nkind: TLSPolicy\n"
	isListener = "---\napiVersion: reseal/v1\nkind: Listener\n"
	isRoute    = "---\napiVersion: reseal/v1\nkind: Route\n"
	isCert     = "---\napiVersion: reseal/v1\nkind: Certificate\n"
	isKeyring  = "---\napiVersion: reseal/v1\nkind: Keyring\n"

	webPool = isPool + "metadata: {name: web}\nspec: {endpoints: [{address: 'a:1'}]}\n"
	tcpPool = isPool + "metadata: {name: tcp}\nspec: {endpoints: [{address: 'a:1'}], protocol: tcp}\n"
	aCert   = isCert + "metadata: {name: c}\nspec: {certificatePem: x, privateKeyPem: sealed text}\n"
)

func TestValidateSnapshot(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"good": {webPool + tcpPool + aCert +
			isPolicy + "metadata: {name: p}\nspec: {alpn: [http/1.1], resumption: {keyring: default}}\n" +
			isListener + "metadata: {name: l}\nspec: {certificates: [c], pool: web, tlsPolicy: p}\n" +
			isListener + "metadata: {name: t}\nspec: {certificates: [c], pool: tcp, protocol: tls}\n" +
			isRoute + "metadata: {name: r}\nspec: {listeners: [l], pools: [{name: web}]}\n", nil},
		"dangling": {isPool + "metadata: {name: web}\nspec: {tls: {clientCertificate: c, policy: p}}\n" +
			isPolicy + "metadata: {name: q}\nspec: {resumption: {keyring: k}}\n" +
			isListener + "metadata: {name: l}\nspec: {certificates: [d, e], pool: x, tlsPolicy: y}\n" +
			isRoute + "metadata: {name: r}\nspec: {listeners: [l, m], pools: [{name: web}, {name: z}]}\n", []string{
			`BackendPool/web: spec.tls.policy: TLSPolicy "p" does not exist`,
			`BackendPool/web: spec.tls.clientCertificate: Certificate "c" does not exist`,
			`Listener/l: spec.certificates[0]: Certificate "d" does not exist`,
			`Listener/l: spec.certificates[1]: Certificate "e" does not exist`,
			`Listener/l: spec.tlsPolicy: TLSPolicy "y" does not exist`,
			`Listener/l: spec.pool: BackendPool "x" does not exist`,
			`Route/r: spec.listeners[1]: Listener "m" does not exist`,
			`Route/r: spec.pools[1].name: BackendPool "z" does not exist`,
			`TLSPolicy/q: spec.resumption.keyring: Keyring "k" does not exist`,
		}},
		"protocols": {webPool + tcpPool + aCert +
			isPolicy + "metadata: {name: p}\nspec: {alpn: [h2, mqtt]}\n" +
			isListener + "metadata: {name: l}\nspec: {certificates: [c], pool: tcp, tlsPolicy: p}\n" +
			isListener + "metadata: {name: t}\nspec: {certificates: [c], pool: web, protocol: tls, tlsPolicy: p}\n" +
			isRoute + "metadata: {name: r}\nspec: {listeners: [l, t], pools: [{name: tcp}]}\n", []string{
			`Listener/l: spec.tlsPolicy: TLSPolicy "p" offers "mqtt" by ALPN, which a listener with protocol https does not speak; it speaks h2 and http/1.1`,
			`Listener/l: spec.pool: BackendPool "tcp" has protocol tcp; a listener with protocol https needs a pool that speaks HTTP`,
			`Listener/t: spec.pool: BackendPool "web" has protocol auto; a listener with protocol tls needs a pool with protocol tcp`,
			`Route/r: spec.listeners[1]: Listener "t" has protocol tls, which has no routes; its traffic goes to its own pool`,
			`Route/r: spec.pools[0].name: BackendPool "tcp" has protocol tcp; a route needs pools that speak HTTP`,
		}},
		"client certificates": {webPool + aCert +
			isPolicy + "metadata: {name: asks}\nspec: {clientAuth: {mode: optional, caPem: x}}\n" +
			isPolicy + "metadata: {name: none}\nspec: {clientAuth: {mode: none}}\n" +
			isListener + "metadata: {name: l1}\nspec: {certificates: [c], tlsPolicy: asks, clientCertificate: {forward: xfcc}}\n" +
			isListener + "metadata: {name: l2}\nspec: {certificates: [c], tlsPolicy: none, clientCertificate: {forward: none}}\n" +
			isListener + "metadata: {name: l3}\nspec: {certificates: [c], tlsPolicy: none, clientCertificate: {forward: xfcc}}\n" +
			isListener + "metadata: {name: l4}\nspec: {certificates: [c], clientCertificate: {forward: rfc9440}}\n" +
			isListener + "metadata: {name: l5}\nspec: {certificates: [c], tlsPolicy: gone, clientCertificate: {forward: rfc9440}}\n", []string{
			`Listener/l3: spec.clientCertificate.forward: xfcc needs a TLSPolicy that asks clients for a certificate; set its clientAuth.mode to optional or require`,
			`Listener/l4: spec.clientCertificate.forward: rfc9440 needs a TLSPolicy that asks clients for a certificate; set its clientAuth.mode to optional or require`,
			`Listener/l5: spec.tlsPolicy: TLSPolicy "gone" does not exist`,
		}},
		"lifetime above the default": {isPolicy + "metadata: {name: p}\nspec: {resumption: {ticketLifetime: 13h}}\n",
			[]string{`TLSPolicy/p: spec.resumption.ticketLifetime: 13h is above the retireAfter 12h of Keyring "default": keys would end before their tickets`}},
		"lifetime above a keyring without retireAfter": {
			isKeyring + "metadata: {name: k}\n" +
				isPolicy + "metadata: {name: p}\nspec: {resumption: {ticketLifetime: 13h, keyring: k}}\n",
			[]string{`TLSPolicy/p: spec.resumption.ticketLifetime: 13h is above the retireAfter 12h of Keyring "k": keys would end before their tickets`}},
		"retireAfter too low": {
			isKeyring + "metadata: {name: k}\nspec: {retireAfter: 1h}\n" +
				isPolicy + "metadata: {name: p}\nspec: {resumption: {keyring: k}}\n",
			[]string{`Keyring/k: spec.retireAfter: 1h is below the ticketLifetime 12h of TLSPolicy "p": keys would end before their tickets`}},
		"retireAfter too low for the default policy": {
			isKeyring + "metadata: {name: default}\nspec: {retireAfter: 1h}\n" + aCert +
				isListener + "metadata: {name: l}\nspec: {certificates: [c]}\n",
			[]string{`Keyring/default: spec.retireAfter: 1h is below the ticketLifetime 12h of Listener "l", which has no tlsPolicy: keys would end before their tickets`}},
		"retireAfter and lifetime equal": {
			isKeyring + "metadata: {name: k}\nspec: {retireAfter: 1h}\n" +
				isPolicy + "metadata: {name: p}\nspec: {resumption: {keyring: k, ticketLifetime: 1h}}\n", nil},
		"resumption off": {isPolicy + "metadata: {name: p}\nspec: {resumption: {enabled: false, ticketLifetime: 100h}}\n", nil},
		"unused keyring": {isKeyring + "metadata: {name: k}\nspec: {retireAfter: 0s}\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, snapshotViolations(t, test.text)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateSnapshotWithoutSpec(t *testing.T) {
	empty := &resealv1.Resource{Metadata: &resealv1.Metadata{Name: "x"}}
	if got := ValidateSnapshot(resealv1.NewSnapshot("c", 1, slices.Repeat([]*resealv1.Resource{empty}, 2))); got != nil {
		t.Errorf("%v", got)
	}
}
