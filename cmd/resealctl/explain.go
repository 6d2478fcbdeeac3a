package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
)

// textWidth is the width to which documentation is wrapped.
const textWidth = 79

func newExplainCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "explain KIND[.FIELD...]",
		Short:             "Show the documentation of a kind or field",
		Long:              "Show the documentation of a kind or field of a manifest. It needs no control plane.",
		Example:           "  resealctl explain backendpool\n  resealctl explain pool.connections.reuse",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFields,
		RunE: func(_ *cobra.Command, args []string) error {
			doc, err := manifest.Explain(args[0])
			if err != nil {
				return err
			}
			a.printDoc(doc)
			return nil
		},
	}
}

func (a *app) printDoc(doc manifest.Doc) {
	kind, field, isField := strings.Cut(doc.Path, ".")
	a.printf("KIND:    %s\nVERSION: %s\n", kind, manifest.APIVersion)
	if isField {
		a.printf("FIELD:   %s <%s>%s\n", field, doc.Type, docMarks(doc))
	}
	a.printf("\n%s", wrap(doc.Comment, ""))
	if len(doc.Values) > 0 {
		a.printf("\nVALUES:\n")
		for _, value := range doc.Values {
			a.printf("  %s\n%s", value.Name, wrap(value.Comment, "      "))
		}
	}
	if len(doc.Fields) > 0 {
		a.printf("\nFIELDS:\n")
	}
	for _, f := range doc.Fields {
		a.printf("  %s <%s>\n%s", f.Name, f.Type, wrap(f.Comment, "      "))
		if len(f.OneOf) > 0 {
			a.printf("      Not together with %s.\n", strings.Join(f.OneOf, ", "))
		}
	}
}

func docMarks(doc manifest.Doc) string {
	marks := ""
	if doc.Secret {
		marks += " (write-only)"
	}
	if doc.Assigned {
		marks += " (assigned by the control plane)"
	}
	return marks
}

// wrap breaks paragraphs into lines.
func wrap(text, indent string) string {
	var out strings.Builder
	for i, paragraph := range strings.Split(text, "\n\n") {
		if i > 0 {
			out.WriteByte('\n')
		}
		line := ""
		for _, word := range strings.Fields(paragraph) {
			if line != "" && len(indent)+len(line)+1+len(word) > textWidth {
				fmt.Fprintf(&out, "%s%s\n", indent, line)
				line = ""
			}
			line = strings.TrimSpace(line + " " + word)
		}
		if line != "" {
			fmt.Fprintf(&out, "%s%s\n", indent, line)
		}
	}
	return out.String()
}
