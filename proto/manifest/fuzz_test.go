package manifest

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"
)

// FuzzParse checks that no input panics, that every error has its form, and that
// what can be read is written and read back equal.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		jetty,
		sampleYAML,
		"---\n" + jetty + "---\n" + sampleYAML,
		`{"apiVersion":"reseal/v1","kind":"List","items":[{"apiVersion":"reseal/v1","kind":"Keyring","metadata":{"name":"a","labels":{"x":"\ud83d\ude00"}},"spec":{}}]}`,
		"apiVersion: reseal/v1\nkind: Route\nmetadata: {name: r}\nspec: {listeners: [a], paths: [{prefix: /}, {exact: ''}], pools: [{name: p, weight: 0}], requestHeaders: {set: {A: b}}}\n",
		"apiVersion: reseal/v1\nkind: TLSPolicy\nmetadata: {name: p}\nspec: {minVersion: tls1.3, resumption: {enabled: false, ticketLifetime: 1h}, alpn: [h2]}\n",
		"apiVersion: reseal/v1\nkind: Listener\nmetadata: {name: l}\nspec: {address: ':443', certificates: [c], forwarded: {trustedCIDRs: [10.0.0.0/8]}}\n",
		"apiVersion: reseal/v1\nkind: Certificate\nmetadata: {name: c}\nspec:\n  certificatePem: |\n    -----BEGIN CERTIFICATE-----\n    -----END CERTIFICATE-----\n",
		"a: &x [*x]\n", "? {a: b}\n: c\n", "--- |\n x\n", "\ufeff{}", "a: [", "%YAML 1.1\n---\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := Parse("f", data)
		var all Errors
		if err != nil && !errors.As(err, &all) {
			t.Fatalf("error is a %T: %v", err, err)
		}
		objects, _ := parse("f", data, false)
		for _, object := range objects {
			var asYAML, asJSON bytes.Buffer
			if err := errors.Join(FormatYAML(&asYAML, object.Resource), FormatJSON(&asJSON, object.Resource)); err != nil {
				t.Fatal(err)
			}
			for _, text := range [][]byte{asYAML.Bytes(), asJSON.Bytes()} {
				back, err := parse("f", text, false)
				if err != nil || len(back) != 1 || !proto.Equal(object.Resource, back[0].Resource) {
					t.Fatalf("does not read back: %v\n%s", err, text)
				}
			}
		}
	})
}
